"""DCT-AdamW's step on a matrix in Triton's kernels, instead of torch's operators: `kernels="triton"`.

    energy of the columns      of the rows, without their coordinates in memory; summed over ranks as ever
    direction                  projection, moments and direction in one
    weight                     lift, decay and update in one

The path in torch (`dist_lowrank.optim.low_rank`) says what it computes; it stays for what has no kernel: products for
`sum_coefficients`, and lifts into a part of the columns.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.optim.columns import ColumnBasis, DictionaryColumns
from dist_lowrank.optim.low_rank import LowRank
from dist_lowrank.optim.moments import Adam
from dist_lowrank.optim.options import refuse
from dist_lowrank.optim.recipe import Update
from dist_lowrank.optim.rounding import RowNoise
from dist_lowrank.optim.subspace import Place
from dist_lowrank.sharding.rule import Rule

_ALLOWED: dict[str, tuple[Any, ...]] = {  # with these kernels
    "dictionary": ("dct2", "dct3", "hadamard", "random"),
    "transform": ("gemm",),
    "ranking": ("l2",),
    "selection": ("current",),
    "error_feedback": ("none",),
    "column_bias_correction": (False,),
    "moment_dtype": (None, torch.float32, torch.bfloat16),
}


def check_options(group: Mapping[str, Any]) -> None:
    """Raises ValueError for an option of DCT-AdamW that the kernels do not cover."""
    for name, allowed in _ALLOWED.items():
        if group[name] not in allowed:
            raise refuse("kernels", "triton", f"torch with {name}={group[name]!r}")


def check_device(device_type: str, precision: str = "fp32") -> None:
    """Raises ValueError unless the kernels run there: on a GPU, or in Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "meta":
        return  # nothing runs there
    if importlib.util.find_spec("triton") is None:
        raise refuse("kernels", "triton", "torch, where the package triton is not installed")
    if device_type != "cuda" and not interpreted:
        raise refuse("kernels", "triton", f"torch on the device type {device_type!r}; triton on 'cuda'")
    if interpreted and precision == "bf16":
        raise refuse(
            "kernels", "triton", "torch with transform_precision='bf16' in Triton's interpreter, which lacks it"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonLowRank(LowRank):
    """DCT-AdamW without what `check_options` refuses."""

    subspace: TritonColumns
    moments: Adam

    def check_parameter(self, parameter: Tensor) -> None:
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise refuse("kernels", "triton", f"torch for parameters of {parameter.dtype}")
        check_device(parameter.device.type, self.subspace.precision)

    def rule(self, rows: Tensor, state: Mapping[str, Tensor], step: int, place: Place, noise: RowNoise) -> Rule[Update]:
        subspace, moments, choice = self.subspace, self.moments, None
        kept = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
        basis = subspace.stored(state, place)
        if self.refreshes(step):
            scores = yield basis.energy(rows[place.owned])  # (n,)
            choice = subspace.chosen(scores, state, place, self.choices_before(step))
            assert isinstance(choice.basis, TritonBasis)
            change, basis = choice.basis.change_from(basis), choice.basis
            moments.carry(kept, change, self.transition, step)
            subspace.store(basis, state)
        direction = basis.direction(rows, kept["exp_avg"], kept["exp_avg_sq"], step, moments)
        return Update(direction, basis, choice)


@dataclass(frozen=True, slots=True)
class TritonColumns(DictionaryColumns):
    """Columns of a dictionary that is kept as a matrix."""

    def stored(self, state: Mapping[str, Tensor], place: Place) -> TritonBasis:
        return self.basis(place, state["indices"].long())

    def basis(self, place: Place, indices: Tensor) -> TritonBasis:
        return TritonBasis(self._ready(place), indices)


@dataclass(slots=True)
class TritonBasis(ColumnBasis):
    """The columns at `indices`, and what kernels make with them."""

    def energy(self, rows: Tensor) -> Tensor:
        """Of all columns of the dictionary, (n,), in rows (l, n)."""
        from dist_lowrank.kernels import triton_step  # here, as the package need not be where steps are but planned

        return triton_step.column_energy(rows, self.dictionary.atoms)

    def direction(self, rows: Tensor, mean: Tensor, square: Tensor, step: int, adam: Adam) -> Tensor:
        """Adam's, (l, r), of the coefficients of rows (l, n); the moments (l, r) move in place."""
        from dist_lowrank.kernels import triton_step

        atoms = self.dictionary.atoms
        return triton_step.project_and_direct(rows, atoms, self.indices, mean, square, step, adam.betas, adam.eps)

    def add_lifted(
        self, target: Tensor, coefficients: Tensor, *, decay: float, scale: float, columns: slice = slice(None)
    ) -> None:
        from dist_lowrank.kernels import triton_step

        if columns.indices(self.dictionary.n) != (0, self.dictionary.n, 1):
            ColumnBasis.add_lifted(self, target, coefficients, decay=decay, scale=scale, columns=columns)
            return
        coefficients = coefficients.contiguous()
        triton_step.lift_into(target, coefficients, self.dictionary.atoms, self.indices, decay=decay, scale=scale)
