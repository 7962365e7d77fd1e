"""CAME: Adafactor's direction with momentum, scaled by how much it agrees with its own average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.optim.adafactor import clipped
from dist_lowrank.optim.direct import DirectOptimizer, recipe_options
from dist_lowrank.optim.options import check_number, check_positive, refuse
from dist_lowrank.optim.recipe import Recipe, Rounds, Update
from dist_lowrank.optim.rounding import RowNoise
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.subspace import Place
from dist_lowrank.optim.whole import ColumnFactors, WholeRows, follow_squares
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule


class CAME(DirectOptimizer):
    """Confidence-guided adaptive optimization (arXiv 2307.02047, algorithm 2).

        U = G / sqrt(factored mean of G^2 + eps1), clipped to rms 1, as Adafactor's with a constant b2
        A <- b1 A + (1 - b1) U
        W <- (1 - lr wd) W - lr A / sqrt(factored mean of (U - A)^2 + eps2)

    | | |
    |---|---|
    | defaults | betas (0.9, 0.95, 0.995), its authors' for LLaMA, at 0.5 to 0.9 of AdamW's lr; eps (1e-30, 1e-16) |
    | of its authors' class | betas (0.9, 0.999, 0.9999): the first step's rms is 11 lr, without bias correction |
    | decay | before the update |
    | state per matrix | R C + 2 (R + C) numbers: more than Adam's in bf16 |
    | sums per step | C + 1 numbers, 1, and C + 1 |
    | replicas exchange | whole rows |

    The state is in float32, or float64 for float64 parameters. One-dimensional parameters are AdamW's; the authors'
    code gives them `A` alone as the update.

    Args:
        betas: of the momentum, the squares, and the squared distance from the momentum.
        options: as `DirectOptimizer`'s.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.95, 0.995),
        eps: tuple[float, float] = (1e-30, 1e-16),
        *,
        clip_threshold: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "clip_threshold": clip_threshold}, options)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        own = {key: group[key] for key in ("betas", "eps", "clip_threshold")}
        return ConfidentRows(**recipe_options(group), rank=1.0, **own)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfidentRows(Recipe):
    """Momentum of rows over the root of a factored second moment, over how far the rows are from it."""

    betas: tuple[float, float, float]
    eps: tuple[float, float]
    clip_threshold: float

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        _check_length("betas", self.betas, 3)
        _check_length("eps", self.eps, 2)
        for beta in self.betas:
            check_number("betas", beta, below=1)
        for eps in self.eps:
            check_positive("eps", eps)
        check_positive("clip_threshold", self.clip_threshold)

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        rows = StateTensor(1, dtype, "moments")
        columns = StateTensor(form.n, dtype, "moments", sharded=False)
        return {
            "exp_avg": StateTensor(form.n, dtype, "moments"),
            "exp_avg_sq_row": rows,
            "exp_avg_sq_col": columns,
            "exp_avg_res_row": rows,
            "exp_avg_res_col": columns,
        }

    def rounds(self, form: TallForm, refresh: bool) -> Rounds:
        return [form.n + 1, 1, form.n + 1]

    def rule(self, rows: Tensor, state: Mapping[str, Tensor], step: int, place: Place, noise: RowNoise) -> Rule[Update]:
        beta1, beta2, beta3 = self.betas
        form, owned = place.form, place.owned
        squares = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        weights, columns = yield from follow_squares(rows.square().add_(self.eps[0]), *squares, beta2, form, owned)
        basis = ColumnFactors(columns)
        weights = yield from clipped(rows, weights, basis, self.clip_threshold, place)
        update = basis.of(rows, weights)  # (l, n)
        del rows
        mean = state["exp_avg"].lerp_(update, 1 - beta1)
        distance = update.sub_(mean).square_().add_(self.eps[1])
        del update
        residuals = state["exp_avg_res_row"], state["exp_avg_res_col"]
        # Handed over, not kept here while the sum is on its way.
        following = follow_squares(distance, *residuals, beta3, form, owned)
        del distance
        weights, columns = yield from following
        return Update(ColumnFactors(columns).of(mean, weights), WholeRows())


def _check_length(name: str, values: Any, count: int) -> None:
    if not isinstance(values, Sequence) or len(values) != count:
        raise refuse(name, values, f"{count} numbers")
