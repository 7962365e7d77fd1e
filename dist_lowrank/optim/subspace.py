"""What a recipe asks of its subspace: which directions, how to go in and out, how moments follow a change.

A subspace works on *coordinates* of the rows: for dictionary columns these are coordinates in the dictionary, in which
choosing is indexing; for projections the rows themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dist_lowrank.dictionaries import DictionaryCache
from dist_lowrank.optim.roles import Role
from dist_lowrank.optim.rounding import RandomBits
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule


class Change(Protocol):
    """From one basis to the next."""

    def carry(self, transition: str, first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
        """Takes state that belongs to directions along, in place; see `TRANSITIONS`.

        Args:
            first: (..., r), linear in the coefficients.
            second: (..., r), quadratic in them, or a count for each direction.
        """

    def return_dropped(self, coordinates: Tensor, momentum: Tensor) -> None:
        """Adds what of a momentum (l, r) on the old directions the new ones lack to coordinates (l, n), in place."""


class Lift(Protocol):
    """From coefficients to rows."""

    def add_lifted(
        self, target: Tensor, coefficients: Tensor, *, decay: float, scale: float, columns: slice = slice(None)
    ) -> None:
        """In place: `target = decay * target + scale * lifted[:, columns]`, from (l, r) to (l, width of columns)."""


class Basis(Lift, Protocol):
    """The chosen directions of one matrix."""

    def take(self, coordinates: Tensor) -> Tensor:
        """Coefficients (l, r) of coordinates (l, n)."""

    def project(self, rows: Tensor) -> Tensor:
        """Coefficients (l, r) of rows (l, n)."""

    def replace(self, coordinates: Tensor, coefficients: Tensor, keep: float) -> None:
        """In place: coordinates whose `coefficients` were taken keep the `keep`-th part of them."""

    def change_from(self, previous: Any) -> Change: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """A basis, at the step that chose it."""

    basis: Basis
    captured: Tensor | None = None  # (): share of the score that it holds
    previous_indices: Tensor | None = None  # of columns; empty at the first choice


@dataclass(frozen=True, slots=True)
class Place:
    """Which matrix a subspace is asked about, and with what at hand."""

    form: TallForm
    dtype: torch.dtype
    device: torch.device
    repeated: bool  # other ranks do the same work and must round alike
    cache: DictionaryCache
    random: RandomBits  # of the matrix; the subspace names step and purpose
    owned: slice  # of this rank's rows, those that count in sums
    role: Role | None = None  # with a dictionary of its own
    counter: Tensor | None = None  # (), of its updates, this one included, float32, if it is on the device
    alone: bool = False  # nothing else is updated meanwhile: what was made for projecting may stay for lifting
    scores: Tensor | None = None  # (n,), of its columns, where ranks have summed them before the step

    @property
    def new_dictionary(self) -> bool:
        """Whether the dictionary to choose from is not the one that the stored choice belongs to."""
        return self.role is not None and self.role.previous is not None


@dataclass(frozen=True, slots=True)
class Possible:
    """A sum of that many elements that is made only where the rank of the gradient is below that of the subspace."""

    elements: int


Statistics = Sequence[int | Possible]


class Subspace(Protocol):
    """Which directions."""

    uses_momentum: ClassVar[bool]  # to choose

    def scratch_elements(self, form: TallForm) -> int:
        """What choosing or making the basis needs beside coordinates and statistics, in elements of four bytes."""

    def check(self, form: TallForm) -> None:
        """Raises ValueError for a matrix that has no such subspace."""

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]: ...

    def statistics(self, form: TallForm, first: bool = False) -> Statistics:
        """By round of a choice, the first or a later one: the number of elements summed over ranks."""

    def coordinates(self, rows: Tensor, place: Place) -> Tensor:
        """Of rows (l, n); may be the rows themselves."""

    def stored(self, state: Mapping[str, Tensor], place: Place) -> Basis:
        """The basis chosen last."""

    def choose(
        self, coordinates: Tensor, state: Mapping[str, Tensor], place: Place, number: int, mean: Tensor | None
    ) -> Rule[Choice]:
        """Chooses from coordinates (l, n). The basis at hand stays valid until `store`.

        Args:
            number: of choices made before this one.
            mean: (l, r), of past coefficients on the basis at hand; None at the first choice, or if unused.
        """

    def store(self, basis: Any, state: Mapping[str, Tensor]) -> None:
        """Keeps a choice in the state."""
