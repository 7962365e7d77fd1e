"""A low-rank optimizer is a recipe of four parts; this is the rule that they make.

- subspace: which directions (here: columns of a fixed dictionary, by energy);
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

from dist_lowrank.dictionaries import Dictionary, check_dictionary, check_transform
from dist_lowrank.optim.moments import Moments
from dist_lowrank.optim.options import check_choice, check_count, check_number, check_rank, refuse
from dist_lowrank.optim.residuals import Residual
from dist_lowrank.optim.rounding import WEIGHT_ROUNDINGS, RowNoise
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.transitions import TRANSITIONS, change_columns, return_dropped
from dist_lowrank.sharding.layouts import SIDES, TallForm
from dist_lowrank.sharding.rule import Rule
from dist_lowrank.subspaces import RANKINGS, column_scores, index_dtype, top_columns

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
    dictionary: str
    ranking: str
    seed: int
    refresh_interval: int
    moments: Moments
    residual: Residual
    transition: str = "move"
    scale: str = "none"
    transform: str = "gemm"
    materialize: bool = True
    return_momentum: bool = False  # of columns that are dropped, to the residual
    weight_rounding: str = "nearest"

    def __post_init__(self) -> None:
        check_number("weight_decay", self.weight_decay)
        check_rank(self.rank)
        check_choice("side", self.side, SIDES)
        check_dictionary(self.dictionary)
        check_transform(self.dictionary, self.transform, self.materialize)
        check_choice("ranking", self.ranking, RANKINGS)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed: {self.seed!r} is not allowed; allowed: an integer")
        check_count("refresh_interval", self.refresh_interval)
        check_choice("transition", self.transition, TRANSITIONS)
        check_choice("scale", self.scale, tuple(SCALES))
        check_choice("weight_rounding", self.weight_rounding, WEIGHT_ROUNDINGS)
        if self.return_momentum and not self.residual.needs_coordinates:
            raise refuse("error_feedback_momentum", True, "False without error_feedback, which is 'none'")
        if self.return_momentum and self.transition != "move":
            # The others keep the momentum of columns that leave, or drop also that of columns that stay.
            raise refuse(
                "error_feedback_momentum", True, f"False with transition={self.transition!r}, True with 'move'"
            )

    def state(self, form: TallForm, dtype: torch.dtype) -> dict[str, StateTensor]:
        """All state of one matrix whose update is computed in `dtype`."""
        return {
            "indices": StateTensor(form.rank, index_dtype(form.n), "indices", sharded=False),
            **self.moments.state(form, dtype),
            **self.residual.state(form, dtype),
        }

    def statistics(self, form: TallForm, refresh: bool) -> list[int]:
        """By round: the size of what the rule of one matrix sums over ranks."""
        scores = [form.n] if refresh else []
        return scores + self.moments.statistics(form)


_COLUMN_OPTIONS = (
    *("lr", "weight_decay", "rank", "side", "dictionary", "ranking", "seed"),
    *("transform", "materialize"),
)


def column_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parameter group that every recipe on dictionary columns has."""
    return {key: group[key] for key in _COLUMN_OPTIONS}


@dataclass(frozen=True, slots=True)
class Update:
    """What a rule returns: `direction @ D[:, indices]^T` is to be subtracted, times the step size."""

    direction: Tensor  # (l, r), this rank's rows
    indices: Tensor  # (r,) int64
    scores: Tensor | None  # (n,) summed over ranks, if the columns were chosen at this step


def low_rank_rule(
    rows: Tensor,
    state: Mapping[str, Tensor],
    step: int,
    recipe: Recipe,
    form: TallForm,
    dictionary: Dictionary,
    noise: RowNoise,
    owned: slice = slice(None),
) -> Rule[Update]:
    """One update of one matrix.

    Args:
        rows: this rank's rows of the gradient, (l, n), float32 or float64; not modified.
        state: this rank's tensors as `recipe.state` declares them; updated in place.
        owned: which of the rows count in this rank's part of a sum.
        step: number of this update, from 1. The columns are chosen at step 1 and at multiples of `refresh_interval`.
        noise: random numbers of these rows at this step.
    """
    refresh = step == 1 or step % recipe.refresh_interval == 0
    previous = indices = state["indices"].long()
    scores = None
    if refresh or recipe.residual.needs_coordinates:
        coordinates = recipe.residual.add_stored(dictionary.transform(rows), state)  # (l, n)
        del rows  # a wave holds either of every matrix, not both
        if refresh:
            scores = yield column_scores(coordinates[owned], recipe.ranking)  # (n,)
            indices = top_columns(scores, form.rank)
            state["indices"].copy_(indices)
        coefficients = coordinates.index_select(1, indices)  # (l, r)
    else:
        coordinates = rows  # all that follows is done without
        coefficients = dictionary.project(rows, indices)
    moments = recipe.moments.read(state, coefficients)
    if refresh:
        momentum = recipe.moments.undelivered(moments) if recipe.return_momentum else None
        if momentum is not None:
            return_dropped(coordinates, momentum, previous, indices)
        change_columns(recipe.transition, moments.values(), previous, indices, form.n)
    if recipe.residual.needs_coordinates:
        recipe.residual.store(coordinates, indices, coefficients, state)
    del coordinates  # nor until its sums are there
    direction = yield from recipe.moments.direction(coefficients, moments, step, owned)
    recipe.moments.write(moments, state, noise)
    return Update(direction, indices, scores)
