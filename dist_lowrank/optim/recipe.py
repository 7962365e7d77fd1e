"""A low-rank optimizer is a recipe of four parts; this is the rule that they make.

- subspace: which directions (columns of a fixed dictionary by energy, or a projection);
- moments: what happens inside the subspace;
- residual: what happens to the rest;
- transition: what happens to the moments when the subspace changes.

The rule reads as if it ran on one process. It sees plain tensors: this rank's rows of a matrix in tall form. Where it
needs a sum over all rows it yields its own part and gets the total (`dist_lowrank.sharding.rounds`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.optim.columns import DictionaryColumns
from dist_lowrank.optim.moments import Moments
from dist_lowrank.optim.options import check_choice, check_count, check_number, check_rank, refuse
from dist_lowrank.optim.residuals import Residual
from dist_lowrank.optim.rounding import WEIGHT_ROUNDINGS, RowNoise
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.subspace import Basis, Choice, Place, Subspace
from dist_lowrank.optim.transitions import TRANSITIONS
from dist_lowrank.sharding.layouts import SIDES, TallForm
from dist_lowrank.sharding.rule import Rule

# Step size of a matrix relative to the learning rate, from its global shape (R, C).
SCALES: dict[str, Callable[[int, int], float]] = {
    "none": lambda rows, cols: 1.0,
    "spectral": lambda rows, cols: max(1.0, (rows / cols) ** 0.5),
    "match_rms_adamw": lambda rows, cols: 0.2 * max(rows, cols) ** 0.5,
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """The low-rank path of one parameter group."""

    lr: float
    weight_decay: float
    rank: int | float
    side: str
    seed: int  # of rounding at random
    refresh_interval: int
    subspace: Subspace
    moments: Moments
    residual: Residual
    transition: str = "move"
    scale: str = "none"
    alpha: float = 1.0  # factor of the direction, but not of what the residual adds
    refresh_after_first: bool = False  # at steps 1, T + 1, 2 T + 1, ... instead of 1, T, 2 T, ...
    decay_last: bool = False  # of the weights that were updated, instead of those before
    return_momentum: bool = False  # of columns that are dropped, to the residual
    weight_rounding: str = "nearest"

    def __post_init__(self) -> None:
        check_number("weight_decay", self.weight_decay)
        check_rank(self.rank)
        check_choice("side", self.side, SIDES)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed: {self.seed!r} is not allowed; allowed: an integer")
        check_count("refresh_interval", self.refresh_interval)
        check_choice("transition", self.transition, TRANSITIONS)
        check_choice("scale", self.scale, tuple(SCALES))
        check_choice("weight_rounding", self.weight_rounding, WEIGHT_ROUNDINGS)
        if self.return_momentum and not self.residual.needs_coordinates:
            raise refuse("error_feedback_momentum", True, "False without error_feedback, which is 'none'")
        if self.return_momentum and not self.transition.startswith("move"):
            # The others keep the momentum of columns that leave, or drop also that of columns that stay.
            raise refuse(
                "error_feedback_momentum", True, f"False with transition={self.transition!r}, True with 'move'"
            )

    def state(self, form: TallForm, dtype: torch.dtype) -> dict[str, StateTensor]:
        """All state of one matrix whose update is computed in `dtype`."""
        parts = (self.subspace, self.moments, self.residual)
        return {key: spec for part in parts for key, spec in part.state(form, dtype).items()}

    def refreshes(self, step: int) -> bool:
        """Whether directions are chosen at a step."""
        if self.refresh_after_first:
            return (step - 1) % self.refresh_interval == 0
        return step == 1 or step % self.refresh_interval == 0

    def choices_before(self, step: int) -> int:
        """At a step that chooses: a number that grows with each choice, 0 at the first."""
        return 0 if step == 1 else max(1, (step - self.refresh_after_first) // self.refresh_interval)

    @property
    def full_rows(self) -> bool:
        """Whether the update has more than a lifted direction."""
        return self.residual.full_rows

    def columns_delivered(self, form: TallForm) -> int:
        """Numbers per row that ranks need to update each other's rows."""
        return self.residual.lifts * form.rank + self.full_rows

    def statistics(self, form: TallForm, refresh: bool) -> list[int]:
        """By round: the size of what the rule of one matrix sums over ranks."""
        chosen = self.subspace.statistics(form) if refresh else []
        return chosen + self.moments.statistics(form) + self.residual.statistics(form)


def column_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What every recipe on dictionary columns takes from the options of its parameter group."""
    keys = ("dictionary", "ranking", "transform", "materialize", "seed")
    shared = {key: group[key] for key in ("lr", "weight_decay", "rank", "side", "seed", "weight_rounding")}
    return {**shared, "subspace": DictionaryColumns(**{key: group[key] for key in keys})}


@dataclass(frozen=True, slots=True)
class Update:
    """What a rule returns: the lifted direction and what the residual adds, to be subtracted times the step size."""

    direction: Tensor  # (l, r), this rank's rows; (l, 0): nothing is lifted
    basis: Basis
    choice: Choice | None  # if the directions were chosen at this step
    weights: Tensor | None = None  # (l, 1), of the rows that the residual adds


def low_rank_rule(
    rows: Tensor, state: Mapping[str, Tensor], step: int, recipe: Recipe, place: Place, noise: RowNoise
) -> Rule[Update]:
    """One update of one matrix.

    Args:
        rows: this rank's rows of the gradient, (l, n), float32 or float64; not modified.
        state: this rank's tensors as `recipe.state` declares them; updated in place.
        step: number of this update, from 1.
        noise: random numbers of these rows at this step.
    """
    refresh, subspace, residual = recipe.refreshes(step), recipe.subspace, recipe.residual
    basis, choice = subspace.stored(state, place), None
    moments = recipe.moments.read(state, place.form.rank, place.dtype)
    if refresh or residual.needs_coordinates:
        coordinates = residual.add_stored(subspace.coordinates(rows, place), state)  # (l, n)
        if not residual.full_rows:
            del rows  # a wave holds either of every matrix, not both
        if refresh:
            mean = recipe.moments.mean(moments, step) if subspace.uses_momentum and step > 1 else None
            choice = yield from subspace.choose(coordinates, state, place, recipe.choices_before(step), mean)
            change, basis = choice.basis.change_from(basis), choice.basis
        coefficients = basis.take(coordinates)  # (l, r)
        if refresh:
            momentum = recipe.moments.undelivered(moments) if recipe.return_momentum else None
            if momentum is not None:
                change.return_dropped(coordinates, momentum)
            recipe.moments.carry(moments, change, recipe.transition, step)
            subspace.store(basis, state)
        residual.store(coordinates, basis, coefficients, state)
    else:
        coordinates = rows  # all that follows is done without
        coefficients = basis.project(rows)
        if not residual.full_rows:
            del rows
    del coordinates  # nor until its sums are there
    direction = yield from recipe.moments.direction(coefficients, moments, step, place.owned)
    recipe.moments.write(moments, state, noise)
    weights = None
    if residual.full_rows:
        factor = recipe.moments.step_factor(step)
        found = yield from residual.weights(rows, coefficients, direction / factor, basis, state, place.owned)
        weights = found * factor
    direction = direction * recipe.alpha if residual.lifts else direction[:, :0]
    return Update(direction, basis, choice, weights)
