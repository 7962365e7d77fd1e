"""What happens to the part of the gradient outside the subspace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dist_lowrank.optim.options import check_number
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.storage import Floats, Storage
from dist_lowrank.optim.subspace import Basis
from dist_lowrank.sharding.layouts import TallForm


class Residual(Protocol):
    """Adds what was left over to the coordinates of a gradient, and keeps what is left over now."""

    needs_coordinates: ClassVar[bool]  # at every step, not only at a refresh

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]: ...

    def add_stored(self, coordinates: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Coordinates (l, n) plus what is stored; may return the stored tensor itself, updated.

        Unless `needs_coordinates` is false, the result is no view of a gradient and may be modified.
        """

    def store(self, coordinates: Tensor, basis: Basis, coefficients: Tensor, state: Mapping[str, Tensor]) -> None:
        """Stores what is left of the sum (l, n) after its `coefficients` (l, r) on the basis were used."""


@dataclass(frozen=True, slots=True)
class Drop:
    """The rest is dropped."""

    needs_coordinates: ClassVar[bool] = False

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        return {}

    def add_stored(self, coordinates: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return coordinates

    def store(self, coordinates: Tensor, basis: Basis, coefficients: Tensor, state: Mapping[str, Tensor]) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Accumulate:
    """The rest waits in an accumulator, in the subspace's coordinates, together with `keep` of what was used.

    For dictionary columns: `E += A D; a = E[:, I]; E[:, I] *= keep`. With keep = 0 this is error feedback; with keep =
    mu the momentum of Trion (`M <- M + G - (1 - mu) a D_I^T`), where error feedback lives inside it. Keeping `E` in
    coordinates saves the product `a D_I^T` and its rounding. A `storage` that rounds keeps the chosen columns only as
    near to zero as it resolves.
    """

    name: str  # of the state tensor
    cause: str  # its line in the memory ledger
    keep: float = 0.0
    storage: Storage = field(default_factory=Floats)

    needs_coordinates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(self.name, self.keep, below=1)

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        return self.storage.state(self.name, form.n, dtype, self.cause)

    def add_stored(self, coordinates: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return self.storage.read(self.name, state, coordinates.shape[1], coordinates.dtype).add_(coordinates)

    def store(self, coordinates: Tensor, basis: Basis, coefficients: Tensor, state: Mapping[str, Tensor]) -> None:
        basis.replace(coordinates, coefficients, self.keep)
        self.storage.write(self.name, coordinates, state)
