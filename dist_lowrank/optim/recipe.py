"""What an optimizer says of the matrices of a parameter group: the rule, and what the engine has to know of it.

A rule reads as if it ran on one process. It sees plain tensors: this rank's rows of a matrix in tall form. Where it
needs a sum over all rows it yields its own part and gets the total; where it needs the whole matrix on one rank it
yields a request (`dist_lowrank.sharding.rounds`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.optim.options import check_choice, check_number, check_rank, refuse
from dist_lowrank.optim.rounding import WEIGHT_ROUNDINGS, RowNoise
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.subspace import Choice, Lift, Place, Possible
from dist_lowrank.sharding.layouts import SIDES, TallForm
from dist_lowrank.sharding.rule import Rule

# Step size of a matrix relative to the learning rate, from its global shape (R, C).
SCALES: dict[str, Callable[[int, int], float]] = {
    "none": lambda rows, cols: 1.0,
    "spectral": lambda rows, cols: max(1.0, (rows / cols) ** 0.5),
    "fan_ratio": lambda rows, cols: float((rows / cols) ** 0.5),
    "match_rms_adamw": lambda rows, cols: 0.2 * max(rows, cols) ** 0.5,
}


@dataclass(frozen=True, slots=True)
class Sum:
    """A round that sums over ranks, in another dtype than that of the arithmetic."""

    elements: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Whole:
    """A round in which the owner of a matrix gets all of its rows."""

    columns: int  # of each row that travel, and come back
    dtype: torch.dtype | None = None  # in which they do; None: of the arithmetic


Rounds = list[int | Possible | Sum | Whole]  # an integer: a sum of that many elements


@dataclass(frozen=True, slots=True)
class Update:
    """What a rule returns: the lifted direction and what is made of rows, to be subtracted times the step size."""

    direction: Tensor  # (l, r), this rank's rows; (l, 0): nothing is lifted
    basis: Lift
    choice: Choice | None = None  # if directions were chosen at this step
    weights: Tensor | None = None  # (l, 1), of what `Recipe.added` makes of the rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(ABC):
    """The path of matrices of one parameter group."""

    lr: float | Tensor
    weight_decay: float
    rank: int | float
    side: str
    seed: int  # of rounding at random
    scale: str = "none"
    decay_last: bool = False  # of the weights that were updated, instead of those before
    weight_rounding: str = "nearest"
    capturable: bool = False  # see `dist_lowrank.optim.capturable`

    def __post_init__(self) -> None:
        check_number("weight_decay", self.weight_decay)
        check_rank(self.rank)
        check_choice("side", self.side, SIDES)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise refuse("seed", self.seed, "an integer")
        check_choice("scale", self.scale, tuple(SCALES))
        check_choice("weight_rounding", self.weight_rounding, WEIGHT_ROUNDINGS)

    @abstractmethod
    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        """All state of one matrix beside its step counter, in `dtype` where nothing else is said."""

    @abstractmethod
    def rounds(self, form: TallForm, refresh: bool) -> Rounds:
        """What the rule of one matrix yields, in order: the size of a sum over ranks, or rows that one rank gets whole.

        Args:
            refresh: at a step that chooses directions; those that never or always choose say the same for both.
        """

    def first_rounds(self, form: TallForm) -> Rounds:
        """The same at the first step, whose choice may need other sums than later ones."""
        return self.rounds(form, refresh=True)

    @abstractmethod
    def rule(self, rows: Tensor, state: Mapping[str, Tensor], step: int, place: Place, noise: RowNoise) -> Rule[Update]:
        """One update of one matrix.

        Args:
            rows: this rank's rows of the gradient, (l, n), of the dtype of `operands`; not modified.
            state: this rank's tensors as `state` declares them; updated in place.
            step: number of this update, from 1.
            noise: random numbers of these rows at this step.
        """

    def at(self, position: int, count: int) -> Recipe:
        """The recipe of the matrix that is at a position among `count` of the optimizer, the same on all ranks."""
        return self

    @property
    def rate(self) -> Tensor | None:
        """The learning rate where the host need not know it: a factor of the rule's direction."""
        return self.lr if self.capturable and isinstance(self.lr, Tensor) else None

    def refreshes(self, step: int) -> bool:
        """Whether directions are chosen at a step."""
        return True

    def check(self, form: TallForm) -> None:  # noqa: B027 (most have nothing to refuse)
        """Raises ValueError for a matrix that has no such update."""

    def check_parameter(self, parameter: Tensor) -> None:  # noqa: B027
        """Raises ValueError for a parameter that cannot be updated where it is, or in its dtype."""

    @property
    def full_rows(self) -> bool:
        """Whether the update has something made of the gradient's rows (`added`), beside a lifted direction."""
        return False

    def added(self, rows: Tensor, weights: Tensor, basis: Any) -> Tensor:
        """What is made of rows (l, n) of the gradient by their weights (l, 1), where `full_rows`."""
        return rows * weights

    def operands(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the rows that the rule takes and of its direction, where arithmetic is in `dtype`.

        A narrower one if both are nothing but operands of products. The lift is then rounded once into weights of it.
        """
        return dtype

    def columns_delivered(self, form: TallForm) -> int:
        """Numbers per row that ranks need to update each other's rows."""
        return form.rank + self.full_rows

    def scratch_elements(self, form: TallForm) -> int:
        """What the rule needs beside rows, state and sums, in elements of four bytes."""
        return 0
