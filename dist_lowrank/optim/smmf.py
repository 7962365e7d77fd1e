"""SMMF: both moments as outer products of a matrix's elements laid out as square as they go, and one sign bit each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.optim.direct import DirectOptimizer, recipe_options
from dist_lowrank.optim.options import check_decay, check_number, refuse
from dist_lowrank.optim.quantization import code_columns, pack_signs, unpack_signs
from dist_lowrank.optim.recipe import Recipe, Rounds, Update
from dist_lowrank.optim.rounding import RowNoise
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.subspace import Place
from dist_lowrank.optim.whole import WholeRows
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule


class SMMF(DirectOptimizer):
    """Square-matricized momentum factorization (arXiv 2412.08894).

    The R C elements of a matrix, in row-major order, are seen as a x b, the closest pair of factors of R C, a >= b,
    of the global shape. With `b1_t = beta growth^(t - 1)` and `b2_t = 1 - t^gamma`:

        M = b1_t S (r_M c_M^T) + (1 - b1_t) G;   V = b2_t r_V c_V^T + (1 - b2_t) G^2
        W <- (1 - lr wd) W - lr M / (sqrt(V) + eps)
        S <- sign of M;   r, c <- sums of |M| and of V over rows and over columns, c divided by its total

    | | |
    |---|---|
    | defaults | lr 1e-3, beta 0.9, growth 0.999, gamma -0.5 (its authors advise -0.8 for transformers), eps 1e-8 |
    | decay | before the update |
    | state per matrix | 2 (a + b) numbers, and a bit per element, each row filled up to whole bytes |
    | sums per step | 2 (a + b) numbers |
    | replicas exchange | whole rows |

    The factors are in float32, or float64 for float64 parameters; every rank has all of them, and the bits of its
    rows. Of a prime number of elements a is all of them: then the factors are larger than Adam's moments. `b1_t` falls
    (to 0.006 after 5000 steps), so momentum ends early; the step counter is part of the state. The authors' code keeps
    signs as a byte each. One-dimensional parameters are AdamW's here, factored too there.

    Args:
        options: as `DirectOptimizer`'s.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta: float = 0.9,
        eps: float = 1e-8,
        *,
        growth: float = 0.999,
        gamma: float = -0.5,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "eps": eps, "growth": growth, "gamma": gamma}, options)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        own = {key: group[key] for key in ("beta", "eps", "growth", "gamma")}
        return SquaredMoments(**recipe_options(group), rank=1.0, **own)


def closest_factors(elements: int) -> tuple[int, int]:
    """The pair a >= b with a b = elements whose difference is least."""
    b = next(each for each in range(math.isqrt(elements), 0, -1) if elements % each == 0)
    return elements // b, b


@dataclass(frozen=True, slots=True, kw_only=True)
class SquaredMoments(Recipe):
    """Adam without bias correction, whose moments are put together from factors at each step, and taken apart."""

    beta: float
    eps: float
    growth: float
    gamma: float

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        check_number("beta", self.beta, below=1)
        check_number("eps", self.eps)
        check_number("growth", self.growth)
        if self.growth > 1:
            raise refuse("growth", self.growth, "a number >= 0 and <= 1")
        check_decay("gamma", self.gamma)

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        a, b = closest_factors(form.rows * form.n)
        factors = {
            f"{moment}_{axis}": StateTensor(size, dtype, "moments", sharded=False)
            for moment in ("exp_avg", "exp_avg_sq")
            for axis, size in (("row", a), ("col", b))
        }
        return {**factors, "signs": StateTensor(code_columns(form.n, 1), torch.uint8, "moments")}

    def rounds(self, form: TallForm, refresh: bool) -> Rounds:
        return [2 * sum(closest_factors(form.rows * form.n))]

    def rule(self, rows: Tensor, state: Mapping[str, Tensor], step: int, place: Place, noise: RowNoise) -> Rule[Update]:
        form, owned = place.form, place.owned
        beta1, beta2 = self.beta * self.growth ** (step - 1), 1 - step**self.gamma
        factors = [state[key] for key in ("exp_avg_row", "exp_avg_col", "exp_avg_sq_row", "exp_avg_sq_col")]
        grid = _Grid(*closest_factors(form.rows * form.n), noise.first_row * form.n)
        mean = grid.product(factors[0], factors[1], rows.shape).mul_(unpack_signs(state["signs"], form.n, rows.dtype))
        mean.lerp_(rows, 1 - beta1)  # (l, n)
        square = grid.product(factors[2], factors[3], rows.shape).mul_(beta2).addcmul_(rows, rows, value=1 - beta2)
        del rows
        state["signs"].copy_(pack_signs(mean > 0))
        skipped = _Grid(grid.a, grid.b, grid.first + range(mean.shape[0])[owned].start * form.n)
        sums = [*skipped.sums(mean[owned].abs()), *skipped.sums(square[owned])]
        direction = mean.div_(square.sqrt_().add_(self.eps))
        del mean, square
        total = yield torch.cat(sums)
        for factor, part in zip(factors, torch.split(total, [len(each) for each in factors]), strict=True):
            factor.copy_(part)
        for column in (factors[1], factors[3]):
            whole = column.sum()
            column.div_(torch.where(whole > 0, whole, 1))
        return Update(direction, WholeRows())


@dataclass(frozen=True, slots=True)
class _Grid:
    """A run of elements, in the a x b grid of all of them."""

    a: int
    b: int
    first: int  # element of the run

    def product(self, rows: Tensor, columns: Tensor, shape: torch.Size) -> Tensor:
        """The run's elements of the outer product of (a,) and (b,), in this shape; a tensor of its own."""
        top, bottom, offset = self._within(shape.numel())
        return torch.outer(rows[top:bottom], columns).view(-1)[offset : offset + shape.numel()].view(shape)

    def sums(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of the run's elements: their sums by row of the grid, (a,), and by column, (b,)."""
        top, bottom, offset = self._within(values.numel())
        padded = values.new_zeros((bottom - top) * self.b)
        padded[offset : offset + values.numel()] = values.reshape(-1)
        block = padded.view(bottom - top, self.b)
        rows = values.new_zeros(self.a)
        rows[top:bottom] = block.sum(dim=1)
        return rows, block.sum(dim=0)

    def _within(self, elements: int) -> tuple[int, int, int]:
        """The grid's rows that the run touches, and where in the first of them it begins."""
        top = self.first // self.b
        bottom = -(-(self.first + elements) // self.b) if elements else top
        return top, bottom, self.first - top * self.b
