"""How numbers of state are kept between steps: as floats, or as codes.

A part of a recipe reads its numbers in the dtype of the arithmetic, works on them in place, and writes them back. What
is kept in that dtype is the stored tensor itself all along, and writing it is nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_lowrank.optim.options import check_choice
from dist_lowrank.optim.quantization import (
    code_columns,
    from_dynamic,
    from_geometric,
    from_levels,
    scale_columns,
    to_dynamic,
    to_geometric,
    to_levels,
)
from dist_lowrank.optim.rounding import RowNoise, row_chunks
from dist_lowrank.optim.state import StateTensor


class Storage(Protocol):
    """Keeps a matrix of numbers with a row for each row of the tall form under a name, in one or more tensors."""

    def state(self, name: str, columns: int, dtype: torch.dtype, cause: str) -> dict[str, StateTensor]:
        """The tensors that hold `columns` numbers per row, used in arithmetic of `dtype`. All zero means zero."""

    def read(self, name: str, state: Mapping[str, Tensor], columns: int, dtype: torch.dtype) -> Tensor:
        """The numbers, `columns` per row, in the dtype of the arithmetic; to be modified in place."""

    def write(self, name: str, numbers: Tensor, state: Mapping[str, Tensor], noise: RowNoise | None = None) -> None:
        """Keeps what `read` returned and the caller modified. `noise` is for storages that round at random."""


@dataclass(frozen=True, slots=True)
class Floats:
    """As floats of `dtype`, rounded to nearest; None: the dtype of the arithmetic."""

    dtype: torch.dtype | None = None

    def state(self, name: str, columns: int, dtype: torch.dtype, cause: str) -> dict[str, StateTensor]:
        return {name: StateTensor(columns, self.dtype or dtype, cause)}

    def read(self, name: str, state: Mapping[str, Tensor], columns: int, dtype: torch.dtype) -> Tensor:
        stored = state[name]
        return stored if stored.dtype == dtype else stored.to(dtype)

    def write(self, name: str, numbers: Tensor, state: Mapping[str, Tensor], noise: RowNoise | None = None) -> None:
        if numbers is not state[name]:
            state[name].copy_(numbers)


@dataclass(frozen=True, slots=True)
class Levels:
    """As 4- or 8-bit levels between the least and the largest number of each row."""

    bits: int

    def state(self, name: str, columns: int, dtype: torch.dtype, cause: str) -> dict[str, StateTensor]:
        return {
            name: StateTensor(code_columns(columns, self.bits), torch.uint8, cause),
            f"{name}_ranges": StateTensor(2, torch.float32, cause),
        }

    def read(self, name: str, state: Mapping[str, Tensor], columns: int, dtype: torch.dtype) -> Tensor:
        return from_levels(state[name], state[f"{name}_ranges"], columns, self.bits, dtype)

    def write(self, name: str, numbers: Tensor, state: Mapping[str, Tensor], noise: RowNoise | None = None) -> None:
        for rows in row_chunks(*numbers.shape):
            codes, ranges = to_levels(numbers[rows], self.bits)
            state[name][rows].copy_(codes)
            state[f"{name}_ranges"][rows].copy_(ranges)


@dataclass(frozen=True, slots=True)
class Geometric:
    """As 8-bit codes with evenly spaced logarithms, one scale per row and 256 columns, rounded at random."""

    signed: bool

    def state(self, name: str, columns: int, dtype: torch.dtype, cause: str) -> dict[str, StateTensor]:
        return {
            name: StateTensor(columns, torch.int8 if self.signed else torch.uint8, cause),
            f"{name}_scales": StateTensor(scale_columns(columns), torch.float32, cause),
        }

    def read(self, name: str, state: Mapping[str, Tensor], columns: int, dtype: torch.dtype) -> Tensor:
        return from_geometric(state[name], state[f"{name}_scales"], dtype)

    def write(self, name: str, numbers: Tensor, state: Mapping[str, Tensor], noise: RowNoise | None = None) -> None:
        assert noise is not None
        for rows in row_chunks(*numbers.shape):
            chunk = numbers[rows]
            codes, scales = to_geometric(chunk, noise.uniform(name, rows, chunk), signed=self.signed)
            state[name][rows].copy_(codes)
            state[f"{name}_scales"][rows].copy_(scales)


@dataclass(frozen=True, slots=True)
class Dynamic:
    """As 8-bit codes that are dense near the largest magnitude, one scale per row and 256 columns."""

    signed: bool

    def state(self, name: str, columns: int, dtype: torch.dtype, cause: str) -> dict[str, StateTensor]:
        return {
            name: StateTensor(columns, torch.uint8, cause),
            f"{name}_scales": StateTensor(scale_columns(columns), torch.float32, cause),
        }

    def read(self, name: str, state: Mapping[str, Tensor], columns: int, dtype: torch.dtype) -> Tensor:
        return from_dynamic(state[name], state[f"{name}_scales"], self.signed, dtype)

    def write(self, name: str, numbers: Tensor, state: Mapping[str, Tensor], noise: RowNoise | None = None) -> None:
        for rows in row_chunks(*numbers.shape):
            codes, scales = to_dynamic(numbers[rows], signed=self.signed)
            state[name][rows].copy_(codes)
            state[f"{name}_scales"][rows].copy_(scales)


def momentum_storage(group: Mapping[str, Any]) -> Floats:
    """Of one momentum, from the options of a parameter group."""
    check_choice("moment_dtype", group["moment_dtype"], (None, torch.float32, torch.bfloat16))
    return Floats(group["moment_dtype"])
