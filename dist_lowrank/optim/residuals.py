"""What happens to the part of the gradient outside the subspace."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dist_lowrank.optim.options import check_choice, check_number
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.storage import Floats, Storage
from dist_lowrank.optim.subspace import Basis
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule


class Residual(Protocol):
    """Adds what was left over to the coordinates of a gradient, and keeps what is left over now."""

    needs_coordinates: ClassVar[bool]  # at every step, not only at a refresh
    lifts: ClassVar[bool]  # whether the direction is part of the update
    adds_rows: ClassVar[bool]  # whether it is an `AddedRows`

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]: ...

    def add_stored(self, coordinates: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Coordinates (l, n) plus what is stored; may return the stored tensor itself, updated.

        Unless `needs_coordinates` is false, the result is no view of a gradient and may be modified.
        """

    def store(self, coordinates: Tensor, basis: Basis, coefficients: Tensor, state: Mapping[str, Tensor]) -> None:
        """Stores what is left of the sum (l, n) after its `coefficients` (l, r) on the basis were used."""

    def stored(self, state: Mapping[str, Tensor], n: int, dtype: torch.dtype) -> Tensor | None:
        """What is stored, in coordinates (l, n), not to be modified; None: nothing is, ever."""

    def turn(self, rotation: Tensor, state: Mapping[str, Tensor]) -> None:
        """Takes what is stored to other coordinates, `E <- E rotation`, from (l, n) to (l, n)."""

    def statistics(self, form: TallForm) -> list[int]:
        """By round: the number of elements of what is summed over ranks."""


@dataclass(frozen=True, slots=True)
class Drop:
    """The rest is dropped."""

    needs_coordinates: ClassVar[bool] = False
    lifts: ClassVar[bool] = True  # whether the direction is part of the update
    adds_rows: ClassVar[bool] = False  # whether it is an `AddedRows`

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        return {}

    def add_stored(self, coordinates: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return coordinates

    def store(self, coordinates: Tensor, basis: Basis, coefficients: Tensor, state: Mapping[str, Tensor]) -> None:
        pass

    def stored(self, state: Mapping[str, Tensor], n: int, dtype: torch.dtype) -> Tensor | None:
        return None

    def turn(self, rotation: Tensor, state: Mapping[str, Tensor]) -> None:
        pass

    def statistics(self, form: TallForm) -> list[int]:
        return []


@dataclass(frozen=True, slots=True)
class Accumulate(Drop):
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

    needs_coordinates: ClassVar[bool] = True  # of Drop's, the rest stays

    def __post_init__(self) -> None:
        check_number(self.name, self.keep, below=1)

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        return self.storage.state(self.name, form.n, dtype, self.cause)

    def add_stored(self, coordinates: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        return self.storage.read(self.name, state, coordinates.shape[1], coordinates.dtype).add_(coordinates)

    def store(self, coordinates: Tensor, basis: Basis, coefficients: Tensor, state: Mapping[str, Tensor]) -> None:
        basis.replace(coordinates, coefficients, self.keep)
        self.storage.write(self.name, coordinates, state)

    def stored(self, state: Mapping[str, Tensor], n: int, dtype: torch.dtype) -> Tensor | None:
        return self.storage.read(self.name, state, n, dtype)

    def turn(self, rotation: Tensor, state: Mapping[str, Tensor]) -> None:
        before = self.storage.read(self.name, state, len(rotation), rotation.dtype)
        self.storage.write(self.name, before @ rotation, state)


@dataclass(frozen=True, slots=True)
class Inside:
    """What a step does inside the subspace."""

    basis: Basis
    coefficients: Tensor  # (l, r)
    direction: Tensor  # (l, r), without the step's factor

    def row_ratio(self) -> Tensor:
        """How much longer the direction is than the coefficients, by row, (l, 1)."""
        norms = [torch.linalg.vector_norm(each, dim=1, keepdim=True) for each in (self.direction, self.coefficients)]
        return torch.div(norms[0], norms[1] + 1e-8)


class AddedRows(Drop, ABC):
    """Whole rows are added to the update, each with a weight."""

    __slots__ = ()

    adds_rows: ClassVar[bool] = True

    @abstractmethod
    def weights(self, rows: Tensor, inside: Inside, state: Mapping[str, Tensor], owned: slice) -> Rule[Tensor]:
        """How much of each row (l, n) is added, (l, 1). Yields sums where it needs totals."""

    @abstractmethod
    def added(self, rows: Tensor, weights: Tensor, basis: Basis) -> Tensor:
        """What is added to the update for any rows (l, n) of the gradient."""


@dataclass(frozen=True, slots=True)
class Sign(AddedRows):
    """The rest takes a step of signs, without state (FRUGAL, arXiv 2411.07837)."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("residual_scale", self.scale)

    def weights(self, rows: Tensor, inside: Inside, state: Mapping[str, Tensor], owned: slice) -> Rule[Tensor]:
        yield from ()  # needs no sums
        return rows.new_full((rows.shape[0], 1), self.scale)

    def added(self, rows: Tensor, weights: Tensor, basis: Basis) -> Tensor:
        return _outside(rows, basis).sign_().mul_(weights)


@dataclass(frozen=True, slots=True)
class _Limited(AddedRows):
    """Whole rows, each scaled as Adam scales its coefficients, whose norm may grow by `limit` per step at most.

    The weight of row j is `|direction_j| / |coefficients_j|`. The norm of the weighted rows, summed over ranks, is
    compared with that of the step before, and limited to `limit` times it; 0 switches the limiter off.
    """

    limit: float = 1.01

    def __post_init__(self) -> None:
        check_number("residual_limit", self.limit)

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        wide = torch.promote_types(dtype, torch.float32)  # bfloat16 does not resolve the limit
        return {"residual_norm": StateTensor(1, wide, "other_state", sharded=False)} if self.limit else {}

    def limited(self, norm: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The factor under which the norm, (), stays within the limit."""
        if not self.limit:
            return torch.ones_like(norm)
        previous = state["residual_norm"]
        growth = (norm / (previous[0] + 1e-8)).clamp(min=self.limit) / self.limit
        factor = torch.where(previous[0] > 0, 1 / growth, torch.ones_like(norm))
        previous.copy_((norm * factor).view(1))
        return factor


@dataclass(frozen=True, slots=True)
class NormScaled(_Limited):
    """What is outside the subspace, scaled row by row (Fira, arXiv 2410.01623, section 4).

    `inside` is the part of the coefficients that is left in: 0 in the paper, `1 - alpha` in its code.
    """

    inside: float = 0.0

    def statistics(self, form: TallForm) -> list[int]:
        return [1] if self.limit else []

    def weights(self, rows: Tensor, inside: Inside, state: Mapping[str, Tensor], owned: slice) -> Rule[Tensor]:
        weights = inside.row_ratio()
        if not self.limit:
            return weights
        total = yield self.added(rows, weights, inside.basis)[owned].square().sum()
        return weights * self.limited(total.sqrt(), state)

    def added(self, rows: Tensor, weights: Tensor, basis: Basis) -> Tensor:
        return _outside(rows, basis, keep=self.inside).mul_(weights)


@dataclass(frozen=True, slots=True)
class GradientScaled(_Limited):
    """The gradient itself, scaled; the direction only says how much (APOLLO, arXiv 2412.05270).

    `channel`: row by row. `tensor`: all by one factor, the ratio of the whole norms. Times `sqrt(scale)`.
    """

    per: str = "channel"
    scale: float = 1.0

    lifts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("residual_limit", self.limit)
        check_choice("residual_per", self.per, ("channel", "tensor"))
        check_number("residual_scale", self.scale)

    def statistics(self, form: TallForm) -> list[int]:
        return [3] if self.per == "tensor" else [1] if self.limit else []

    def weights(self, rows: Tensor, inside: Inside, state: Mapping[str, Tensor], owned: slice) -> Rule[Tensor]:
        if self.per == "tensor":
            parts = [part[owned].square().sum() for part in (inside.direction, inside.coefficients, rows)]
            moved, projected, norm = (yield torch.stack(parts)).sqrt()
            weights = (moved / (projected + 1e-8)).expand(rows.shape[0], 1)
            norm = norm * moved / (projected + 1e-8)
        else:
            weights = inside.row_ratio()
            if self.limit:
                norm = (yield (rows * weights)[owned].square().sum()).sqrt()
        if self.limit:
            weights = weights * self.limited(norm, state)
        return torch.mul(weights, self.scale**0.5)

    def added(self, rows: Tensor, weights: Tensor, basis: Basis) -> Tensor:
        return rows * weights


def _outside(rows: Tensor, basis: Basis, keep: float = 0.0) -> Tensor:
    """Rows (l, n) without (but for the `keep`-th part of) what the basis holds of them."""
    outside = rows.clone()
    basis.add_lifted(outside, basis.project(rows), decay=1.0, scale=keep - 1)
    return outside
