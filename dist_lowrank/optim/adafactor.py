"""Adafactor: the second moment as an outer product of means over rows and over columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.optim.direct import DirectOptimizer, recipe_options
from dist_lowrank.optim.options import check_decay, check_number, check_positive
from dist_lowrank.optim.recipe import Recipe, Rounds, Update
from dist_lowrank.optim.rounding import RowNoise
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.subspace import Place
from dist_lowrank.optim.whole import ColumnFactors, WholeRows, follow_squares
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule


class Adafactor(DirectOptimizer):
    """Adafactor with a learning rate that is given (arXiv 1804.04235, as `transformers.Adafactor` has it).

    With `b_t = 1 - t^decay_rate` and means over an axis:

        r <- b_t r + (1 - b_t) mean over columns of (G^2 + eps)
        c <- b_t c + (1 - b_t) mean over rows of (G^2 + eps)
        U = G / sqrt(r c^T / mean(r));   U <- U / max(1, rms(U) / clip_threshold)
        W <- (1 - lr wd) W - lr U                                                 (beta1: lr M, M <- b M + (1 - b) U)

    | | |
    |---|---|
    | defaults | decay_rate -0.8, eps 1e-30, clip_threshold 1, no momentum, no decay |
    | decay | before the update |
    | state per matrix | R + C numbers; with `beta1` also R C |
    | sums per step | C + 1 numbers, then 1 |
    | replicas exchange | a number per row; with `beta1` whole rows |

    The state is in float32, or float64 for float64 parameters. What differs from others: there is no relative step and
    no scaling by the root mean square of the weights (`relative_step=False, scale_parameter=False` there). The
    momentum is of directions, not of steps: under a schedule `transformers` averages `lr U`, here a direction is
    multiplied by the rate of the step that takes it. `torch.optim.Adafactor` has no eps inside the means, and
    multiplies `min(lr, 1 / sqrt(t))` by the root mean square of the weights. One-dimensional parameters are AdamW's,
    not an unfactored Adafactor's.

    Args:
        beta1: of momentum; None: without.
        options: as `DirectOptimizer`'s.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        beta1: float | None = None,
        decay_rate: float = -0.8,
        eps: float = 1e-30,
        clip_threshold: float = 1.0,
        **options: Any,
    ) -> None:
        own = {"lr": lr, "beta1": beta1, "decay_rate": decay_rate, "eps": eps, "clip_threshold": clip_threshold}
        super().__init__(params, own, options)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        rank = 1 if group["beta1"] is None else 1.0
        own = {key: group[key] for key in ("beta1", "decay_rate", "eps", "clip_threshold")}
        return FactoredRows(**recipe_options(group), rank=rank, **own)


@dataclass(frozen=True, slots=True, kw_only=True)
class FactoredRows(Recipe):
    """Rows of the gradient over the root of a factored second moment, clipped by their root mean square."""

    beta1: float | None
    decay_rate: float
    eps: float
    clip_threshold: float

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        if self.beta1 is not None:
            check_number("beta1", self.beta1, below=1)
        check_decay("decay_rate", self.decay_rate)
        check_positive("eps", self.eps)
        check_positive("clip_threshold", self.clip_threshold)

    @property
    def full_rows(self) -> bool:
        return self.beta1 is None

    def added(self, rows: Tensor, weights: Tensor, basis: ColumnFactors) -> Tensor:
        return basis.of(rows, weights)

    def columns_delivered(self, form: TallForm) -> int:
        return 1 if self.full_rows else form.n

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        factors = {
            "exp_avg_sq_row": StateTensor(1, dtype, "moments"),
            "exp_avg_sq_col": StateTensor(form.n, dtype, "moments", sharded=False),
        }
        return factors if self.full_rows else {**factors, "exp_avg": StateTensor(form.n, dtype, "moments")}

    def rounds(self, form: TallForm, refresh: bool) -> Rounds:
        return [form.n + 1, 1]

    def rule(self, rows: Tensor, state: Mapping[str, Tensor], step: int, place: Place, noise: RowNoise) -> Rule[Update]:
        factors = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        beta2 = 1 - step**self.decay_rate
        weights, columns = yield from follow_squares(
            rows.square().add_(self.eps), *factors, beta2, place.form, place.owned
        )
        basis = ColumnFactors(columns)
        weights = yield from clipped(rows, weights, basis, self.clip_threshold, place)
        if self.full_rows:
            return Update(rows.new_empty(rows.shape[0], 0), basis, weights=weights)
        assert self.beta1 is not None
        return Update(state["exp_avg"].lerp_(basis.of(rows, weights), 1 - self.beta1), WholeRows())


def clipped(rows: Tensor, weights: Tensor, basis: ColumnFactors, threshold: float, place: Place) -> Rule[Tensor]:
    """Weights (l, 1) under which the root mean square of the whole update is at most `threshold`; yields one number."""
    total = yield basis.of(rows, weights)[place.owned].square_().sum().view(1)
    rms = (total / (place.form.rows * place.form.n)).sqrt_()
    return weights / (rms / threshold).clamp_(min=1)
