"""SCALE: the gradient with its rows scaled to one size; momentum for the output head alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.optim.direct import DirectOptimizer, recipe_options
from dist_lowrank.optim.options import check_choice, check_number
from dist_lowrank.optim.recipe import Recipe, Rounds, Update
from dist_lowrank.optim.rounding import RowNoise
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.storage import Floats, momentum_storage
from dist_lowrank.optim.subspace import Place
from dist_lowrank.optim.whole import ColumnFactors, WholeRows
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule

_LEAST = 1e-8  # root mean square that is divided by


class SCALE(DirectOptimizer):
    """Row-normalised gradients without state, and momentum in the last layer (arXiv 2506.16659).

    For a gradient `G` (V x d for the vocabulary's matrices), with rms a root mean square, not a norm:

        hidden:     W <- W - lr G / max(rms of each row, 1e-8)
        embedding:  W <- W - lr G / max(rms of each column, 1e-8)       over the vocabulary
        head:       B <- b B + (1 - b) G;   W <- W - lr B / max(rms of each row of B, 1e-8)

    | | |
    |---|---|
    | published | lr 1e-3 (up to 350M), 2e-4 (1B), 1e-4 (7B); momentum 0.9; 10 % warm-up; all in bf16 |
    | decay | before the update |
    | state per matrix | none; of the head its momentum, V d numbers (published: bf16) |
    | sums per step | none; of the embedding d numbers |
    | replicas exchange | a number per row; of the head whole rows |

    What is the embedding and the head is said by the groups (`vocabulary="embedding"` or `"head"`) that
    `param_groups(model, vocabulary="matrices")` makes; without it all matrices are hidden ones. A matrix that is both
    (`"tied"`) follows the rule of the head, with momentum; in the authors' code it follows that of the embedding and
    nothing has momentum. Gains of norms and biases are AdamW's with `dense_lr`, which follows `lr` in proportion
    (published: 2e-2, and 1e-3 for 1B and 7B).

    Args:
        momentum: b, of the head.
        moment_dtype: of the momentum: torch.float32, torch.bfloat16, or None for the dtype of the arithmetic.
        options: as `DirectOptimizer`'s.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        *,
        moment_dtype: torch.dtype | None = None,
        dense_lr: float = 1e-3,
        **options: Any,
    ) -> None:
        own = {"lr": lr, "momentum": momentum, "moment_dtype": moment_dtype, "dense_lr": dense_lr, "vocabulary": None}
        super().__init__(params, own, options)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        check_choice("vocabulary", group["vocabulary"], (None, "embedding", "head", "tied"))
        check_number("momentum", group["momentum"], below=1)
        storage = momentum_storage(group)  # checked for every group, used by the head's
        if group["vocabulary"] in ("head", "tied"):
            return RowsOfMomentum(**recipe_options(group), rank=1.0, momentum=group["momentum"], storage=storage)
        kind = NormalizedColumns if group["vocabulary"] == "embedding" else NormalizedRows
        return kind(**recipe_options(group), rank=1)


def _row_weights(rows: Tensor) -> Tensor:
    """One over the root mean square of each row, (l, 1)."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norms.div_(rows.shape[1] ** 0.5).clamp_(min=_LEAST).reciprocal_()


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizedRows(Recipe):
    """The gradient, each row divided by its root mean square."""

    @property
    def full_rows(self) -> bool:
        return True

    def columns_delivered(self, form: TallForm) -> int:
        return 1

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        return {}

    def rounds(self, form: TallForm, refresh: bool) -> Rounds:
        return []

    def rule(self, rows: Tensor, state: Mapping[str, Tensor], step: int, place: Place, noise: RowNoise) -> Rule[Update]:
        yield from ()  # needs no sums
        return Update(rows.new_empty(rows.shape[0], 0), WholeRows(), weights=_row_weights(rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizedColumns(NormalizedRows):
    """The gradient, each column divided by its root mean square over all rows."""

    def added(self, rows: Tensor, weights: Tensor, basis: ColumnFactors) -> Tensor:
        return basis.of(rows, weights)

    def rounds(self, form: TallForm, refresh: bool) -> Rounds:
        return [form.n]

    def rule(self, rows: Tensor, state: Mapping[str, Tensor], step: int, place: Place, noise: RowNoise) -> Rule[Update]:
        squares = yield rows[place.owned].square().sum(dim=0)  # (n,)
        factors = (squares / place.form.rows).sqrt_().clamp_(min=_LEAST).reciprocal_()
        return Update(rows.new_empty(rows.shape[0], 0), ColumnFactors(factors), weights=rows.new_ones(rows.shape[0], 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsOfMomentum(Recipe):
    """Momentum, each row divided by its root mean square."""

    momentum: float
    storage: Floats

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        return self.storage.state("momentum", form.n, dtype, "moments")

    def rounds(self, form: TallForm, refresh: bool) -> Rounds:
        return []

    def rule(self, rows: Tensor, state: Mapping[str, Tensor], step: int, place: Place, noise: RowNoise) -> Rule[Update]:
        yield from ()  # needs no sums
        momentum = self.storage.read("momentum", state, place.form.n, place.dtype)
        momentum.lerp_(rows, 1 - self.momentum)
        self.storage.write("momentum", momentum, state)
        return Update(momentum * _row_weights(momentum), WholeRows())
