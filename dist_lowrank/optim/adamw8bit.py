"""AdamW with both moments in 8 bits, in blocks that no sharding moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_lowrank.optim.direct import DirectOptimizer, recipe_options
from dist_lowrank.optim.options import check_betas, check_number
from dist_lowrank.optim.recipe import Recipe, Rounds, Update
from dist_lowrank.optim.rounding import RowNoise
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.storage import Dynamic, Floats, Storage
from dist_lowrank.optim.subspace import Place
from dist_lowrank.optim.whole import WholeRows
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule

_LEAST_ELEMENTS = 4096  # of a matrix, below which its moments stay as they are


class AdamW8bit(DirectOptimizer):
    """AdamW (arXiv 1711.05101) whose moments rest as 8-bit dynamic codes (arXiv 2110.02861), as torchao's AdamW8bit.

    | | |
    |---|---|
    | defaults | lr 1e-3, betas (0.9, 0.999), eps 1e-8, weight_decay 0.01 |
    | decay | before the update |
    | state per matrix | 2 R C bytes, and 8 R ceil(C / 256) of scales |
    | sums per step | none |
    | replicas exchange | whole rows |

    A block is 256 numbers of one row, counted from its beginning; the last block of a row may be shorter. Each has a
    float32 scale, its largest magnitude. Matrices of less than 4096 elements keep float32 moments. The update uses the
    moments before they are rounded, to nearest.

    Why not torchao's class: its blocks are runs of 256 elements of the *local* tensor, and which tensors have any is
    asked of the local number of elements. So another number of ranks rounds otherwise, and state saved on one does not
    fit the other. Where C is a multiple of 256 the blocks here are torchao's on one process. One-dimensional
    parameters are AdamW's in float32, by the same options.

    Args:
        options: as `DirectOptimizer`'s, without the `dense_` ones.
    """

    dense_defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **options: Any,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, own, options)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        return CodedMoments(**recipe_options(group), rank=1.0, betas=group["betas"], eps=group["eps"])


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedMoments(Recipe):
    """Adam on whole rows, its moments in 8 bits between steps."""

    betas: tuple[float, float]
    eps: float

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        check_betas("betas", self.betas)
        check_number("eps", self.eps)

    def _storages(self, form: TallForm) -> dict[str, Storage]:
        if form.rows * form.n < _LEAST_ELEMENTS:
            return {"exp_avg": Floats(), "exp_avg_sq": Floats()}
        return {"exp_avg": Dynamic(signed=True), "exp_avg_sq": Dynamic(signed=False)}

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        tensors: dict[str, StateTensor] = {}
        for name, storage in self._storages(form).items():
            tensors |= storage.state(name, form.n, dtype, "moments")
        return tensors

    def rounds(self, form: TallForm, refresh: bool) -> Rounds:
        return []

    def rule(self, rows: Tensor, state: Mapping[str, Tensor], step: int, place: Place, noise: RowNoise) -> Rule[Update]:
        yield from ()  # needs no sums
        beta1, beta2 = self.betas
        storages = self._storages(place.form)
        mean, square = (storage.read(name, state, place.form.n, place.dtype) for name, storage in storages.items())
        mean.lerp_(rows, 1 - beta1)  # (l, n)
        square.mul_(beta2).addcmul_(rows, rows, value=1 - beta2)
        for (name, storage), moment in zip(storages.items(), (mean, square), strict=True):
            storage.write(name, moment, state)
        root = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(self.eps)
        return Update((mean / (1 - beta1**step)).div_(root), WholeRows())
