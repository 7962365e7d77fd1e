"""A low-rank recipe has four parts; this is the rule that they make.

- subspace: which directions (columns of a fixed dictionary by energy, or a projection);
- moments: what happens inside the subspace;
- residual: what happens to the rest;
- transition: what happens to the moments when the subspace changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.optim.capturable import check_rate
from dist_lowrank.optim.columns import DictionaryColumns
from dist_lowrank.optim.moments import Moments
from dist_lowrank.optim.options import check_choice, check_count, refuse
from dist_lowrank.optim.recipe import SCALES, Recipe, Rounds, Update
from dist_lowrank.optim.residuals import AddedRows, Inside, Residual
from dist_lowrank.optim.rounding import RowNoise
from dist_lowrank.optim.shared_columns import columns_of
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.subspace import Place, Subspace
from dist_lowrank.optim.transitions import TRANSITIONS
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank(Recipe):
    """Directions are chosen now and then; the update is made of coefficients on them, and of what the residual adds."""

    refresh_interval: int
    subspace: Subspace
    moments: Moments
    residual: Residual
    transition: str = "move"
    alpha: float = 1.0  # factor of the direction, but not of what the residual adds
    refresh_after_first: bool = False  # at steps 1, T + 1, 2 T + 1, ... instead of 1, T, 2 T, ...
    refresh_stagger: bool = False  # matrix number i chooses at step 1 and then i steps after these
    refresh_offset: int = 0  # these i steps, modulo the interval; `at` sets it
    return_momentum: bool = False  # of columns that are dropped, to the residual

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        check_count("refresh_interval", self.refresh_interval)
        check_choice("refresh_stagger", self.refresh_stagger, (False, True))
        if self.refresh_stagger and self.refresh_interval == 1:
            raise refuse("refresh_stagger", True, "False with refresh_interval=1, when all choose at every step")
        check_choice("transition", self.transition, TRANSITIONS)
        if self.return_momentum and not self.residual.needs_coordinates:
            raise refuse("error_feedback_momentum", True, "False without error_feedback, which is 'none'")
        if self.return_momentum and not self.transition.startswith("move"):
            # The others keep the momentum of columns that leave, or drop also that of columns that stay.
            raise refuse(
                "error_feedback_momentum", True, f"False with transition={self.transition!r}, True with 'move'"
            )

    def check(self, form: TallForm) -> None:
        self.subspace.check(form)

    def check_parameter(self, parameter: Tensor) -> None:
        if self.capturable:
            check_rate(self.lr, parameter)

    def state(self, form: TallForm, dtype: torch.dtype) -> dict[str, StateTensor]:
        parts = (self.subspace, self.moments, self.residual)
        return {key: spec for part in parts for key, spec in part.state(form, dtype).items()}

    def at(self, position: int, count: int) -> LowRank:
        return replace(self, refresh_offset=position % self.refresh_interval) if self.refresh_stagger else self

    def refreshes(self, step: int) -> bool:
        return step == 1 or (step - self.refresh_after_first - self.refresh_offset) % self.refresh_interval == 0

    def choices_before(self, step: int) -> int:
        """At a step that chooses: a number that grows with each choice, 0 at the first."""
        later = (step - self.refresh_after_first - self.refresh_offset) // self.refresh_interval
        return 0 if step == 1 else max(1, later + (self.refresh_offset > 0))

    @property
    def full_rows(self) -> bool:
        return self.residual.adds_rows

    def operands(self, dtype: torch.dtype) -> torch.dtype:
        if self.full_rows or not isinstance(self.subspace, DictionaryColumns):
            return dtype
        return self.subspace.operands(dtype)

    def added(self, rows: Tensor, weights: Tensor, basis: Any) -> Tensor:
        assert isinstance(self.residual, AddedRows)
        return self.residual.added(rows, weights, basis)

    def columns_delivered(self, form: TallForm) -> int:
        return self.residual.lifts * form.rank + self.full_rows

    def rounds(self, form: TallForm, refresh: bool) -> Rounds:
        chosen = self.subspace.statistics(form) if refresh or self.refresh_interval == 1 else []
        return [*chosen, *self._further_sums(form)]

    def first_rounds(self, form: TallForm) -> Rounds:
        return [*self.subspace.statistics(form, first=True), *self._further_sums(form)]

    def _further_sums(self, form: TallForm) -> list[int]:
        return [*self.moments.statistics(form), *self.residual.statistics(form)]

    def scratch_elements(self, form: TallForm) -> int:
        return self.subspace.scratch_elements(form)

    def rule(self, rows: Tensor, state: Mapping[str, Tensor], step: int, place: Place, noise: RowNoise) -> Rule[Update]:
        refresh, subspace, residual = self.refreshes(step) or place.new_dictionary, self.subspace, self.residual
        basis, choice = subspace.stored(state, place), None
        moments = self.moments.read(state, place.form.rank, place.dtype)
        if refresh or residual.needs_coordinates:
            coordinates = residual.add_stored(subspace.coordinates(rows, place), state)  # (l, n)
            if not self.full_rows:
                del rows  # a wave holds either of every matrix, not both
            if refresh:
                mean = self.moments.mean(moments, step) if subspace.uses_momentum and step > 1 else None
                choice = yield from subspace.choose(coordinates, state, place, self.choices_before(step), mean)
                change, basis = choice.basis.change_from(basis), choice.basis
            coefficients = basis.take(coordinates)  # (l, r)
            if refresh:
                momentum = self.moments.undelivered(moments) if self.return_momentum else None
                if momentum is not None:
                    change.return_dropped(coordinates, momentum)
                self.moments.carry(moments, change, self.transition, step)
                subspace.store(basis, state)
            residual.store(coordinates, basis, coefficients, state)
        else:
            coordinates = rows  # all that follows is done without
            coefficients = basis.project(rows)
            if not self.full_rows:
                del rows
        del coordinates  # nor until its sums are there
        own = coefficients.clone() if self.full_rows else coefficients  # to be overwritten
        direction = yield from self.moments.direction(own, moments, step, place)
        self.moments.write(moments, state, noise)
        weights = None
        if self.full_rows:
            assert isinstance(residual, AddedRows)
            factor = self.moments.step_factor(step)
            found = yield from residual.weights(
                rows, Inside(basis, coefficients, direction / factor), state, place.owned
            )
            weights = found * factor
        if not residual.lifts:
            direction = direction[:, :0]
        elif self.alpha != 1:
            direction = direction * self.alpha
        if self.rate is not None:
            direction = direction * (self.rate * -SCALES[self.scale](*place.form.shape))
        return Update(direction.to(self.operands(place.dtype)), basis, choice, weights)


def column_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What every recipe on dictionary columns takes from the options of its parameter group."""
    keys = ("lr", "weight_decay", "rank", "side", "seed", "weight_rounding", "capturable")
    shared = {key: group[key] for key in keys}
    return {**shared, "subspace": columns_of(group["dictionary"], group)}
