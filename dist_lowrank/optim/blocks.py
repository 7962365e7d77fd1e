"""FRUGAL's blocks: some whole matrices have Adam, the others take steps of signs, and they take turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from dist_lowrank.optim.dormant import sleep, wake
from dist_lowrank.optim.options import check_betas, check_choice, check_count, check_number
from dist_lowrank.optim.recipe import Recipe, Rounds, Update
from dist_lowrank.optim.rounding import RandomBits, RowNoise
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.subspace import Place
from dist_lowrank.optim.whole import WholeRows
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule

ORDERS = ("random", "ascending", "descending", "mirror")


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks(Recipe):
    """Of the matrices of the optimizer, `round(fraction * count)` at a time have Adam (arXiv 2411.07837, section 4).

    The turns are told from seed and step, so nothing is stored. Moments of matrices whose turn it is not are zeros
    that take no memory (`dist_lowrank.optim.dormant`).
    """

    betas: tuple[float, float]
    eps: float
    interval: int  # steps of a turn
    fraction: int | float  # of the matrices; an integer is their number
    order: str = "random"
    sign_scale: float = 1.0
    position: int = 0  # among `count` matrices; `at` sets both
    count: int = 1

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        check_betas("betas", self.betas)
        check_number("eps", self.eps)
        check_count("refresh_interval", self.interval)
        check_choice("block_order", self.order, ORDERS)
        check_number("residual_scale", self.sign_scale)

    def at(self, position: int, count: int) -> Blocks:
        return replace(self, position=position, count=count)

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        return {key: StateTensor(form.n, dtype, "moments", dormant=True) for key in ("exp_avg", "exp_avg_sq")}

    def rounds(self, form: TallForm, refresh: bool) -> Rounds:
        return []

    def active(self, step: int) -> bool:
        """Whether it is this matrix's turn."""
        size = self.fraction if isinstance(self.fraction, int) else round(self.fraction * self.count)
        return self.position in _turn(self.order, self.seed, (step - 1) // self.interval, self.count, size)

    def rule(self, rows: Tensor, state: Mapping[str, Tensor], step: int, place: Place, noise: RowNoise) -> Rule[Update]:
        yield from ()  # all of it is element-wise
        age = (step - 1) % self.interval + 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        if not self.active(step):
            sleep(mean)
            sleep(square)
            return Update(rows.sign() * self.sign_scale, WholeRows())
        for moment in (mean, square):
            wake(moment)
            if age == 1:
                moment.zero_()
        first, second = mean.to(rows.dtype), square.to(rows.dtype)  # the moments themselves, unless kept in fewer bits
        first.lerp_(rows, 1 - self.betas[0])
        second.mul_(self.betas[1]).addcmul_(rows, rows, value=1 - self.betas[1])
        if first is not mean:
            mean.copy_(first)
            square.copy_(second)
        root = (second / (1 - self.betas[1] ** age)).sqrt_().add_(self.eps)
        return Update((first / (1 - self.betas[0] ** age)).div_(root), WholeRows())


@lru_cache(maxsize=8)
def _turn(order: str, seed: int, number: int, count: int, size: int) -> frozenset[int]:
    """The positions whose turn it is: `number` turns came before."""
    size = min(size, count)
    if order == "random":
        drawn = RandomBits(seed, "blocks", number).at("turn", torch.arange(count)).argsort(stable=True)
        return frozenset(drawn[:size].tolist())
    if order == "mirror":  # up, then down, in whole windows
        windows = -(-count // max(1, size))
        window = number % (2 * windows)
        start = min(min(window, 2 * windows - 1 - window) * size, count - size)
        return frozenset(range(start, start + size))
    turned = [(number * size + i) % count for i in range(size)]
    return frozenset(turned if order == "ascending" else (count - 1 - each for each in turned))
