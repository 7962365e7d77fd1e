"""What happens inside the subspace: from coefficients to a direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_lowrank.optim.options import check_betas, check_choice, check_count, check_number
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule


class Moments(Protocol):
    """Turns coefficients into a direction of the same shape."""

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        """The state that this part keeps for a matrix whose update is computed in `dtype`."""

    def direction(self, coefficients: Tensor, state: Mapping[str, Tensor], step: int, owned: slice) -> Rule[Tensor]:
        """Returns the direction for this rank's rows, (l, r); yields sums over its `owned` rows to get totals."""

    def columns(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """The state that belongs to single columns of the subspace, column last: it moves when they do."""


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam on the coefficients (arXiv 1412.6980), bias-corrected by the step or by the age of each column.

    A column that enters at a late step has `|direction| = (1 - b1) / sqrt(1 - b2)` when corrected by the step (3.2 for
    betas (0.9, 0.999), 1.0 for (0.9, 0.99)) and 1 when corrected by its age.
    """

    betas: tuple[float, float]
    eps: float
    column_bias_correction: bool = False
    moment_dtype: torch.dtype | None = None  # None: the dtype of the arithmetic

    def __post_init__(self) -> None:
        check_betas("betas", self.betas)
        check_number("eps", self.eps)
        check_choice("column_bias_correction", self.column_bias_correction, (False, True))
        check_choice("moment_dtype", self.moment_dtype, (None, torch.float32, torch.bfloat16))

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        kept = self.moment_dtype or dtype
        tensors = {
            "exp_avg": StateTensor(form.rank, kept, "moments"),
            "exp_avg_sq": StateTensor(form.rank, kept, "moments"),
        }
        if self.column_bias_correction:
            tensors["age"] = StateTensor(form.rank, torch.int32, "indices", sharded=False)
        return tensors

    def direction(self, coefficients: Tensor, state: Mapping[str, Tensor], step: int, owned: slice) -> Rule[Tensor]:
        yield from ()  # needs no sums
        beta1, beta2 = self.betas
        mean, square = state["exp_avg"], state["exp_avg_sq"]  # (l, r)
        if mean.dtype == coefficients.dtype:
            mean.lerp_(coefficients, 1 - beta1)
            square.mul_(beta2).addcmul_(coefficients, coefficients, value=1 - beta2)
        else:
            stored_mean, stored_square = mean, square
            mean = stored_mean.to(coefficients.dtype).lerp_(coefficients, 1 - beta1)
            square = stored_square.to(coefficients.dtype).mul_(beta2)
            square.addcmul_(coefficients, coefficients, value=1 - beta2)
            stored_mean.copy_(mean)
            stored_square.copy_(square)
        if self.column_bias_correction:
            age = state["age"].add_(1).to(coefficients.dtype)  # (r,)
            return (mean / (1 - beta1**age)) / (square / (1 - beta2**age)).sqrt_().add_(self.eps)
        return (mean / (1 - beta1**step)) / (square / (1 - beta2**step)).sqrt_().add_(self.eps)

    def columns(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        return [state[name] for name in ("exp_avg", "exp_avg_sq", "age") if name in state]


@dataclass(frozen=True, slots=True)
class NewtonSchulz:
    """Orthogonalises the coefficients by the quintic Newton-Schulz iteration of Muon.

    Each iterate is the coefficients times a polynomial of their Gram matrix, so the iteration runs on `r x r` matrices
    and needs one sum, of `b^T b`, whose trace is the norm. The same numbers as the usual form on `b` in exact
    arithmetic. Rounding of the Gram matrix grows twelvefold per step, so it is summed anew after every five.
    """

    steps: int = 5
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7

    def __post_init__(self) -> None:
        check_count("newton_schulz_steps", self.steps)

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        return {}

    def direction(self, coefficients: Tensor, state: Mapping[str, Tensor], step: int, owned: slice) -> Rule[Tensor]:
        a, b, c = self.coefficients
        gram = yield coefficients[owned].t() @ coefficients[owned]  # (r, r)
        norm = gram.diagonal().sum().sqrt() + self.eps
        gram = gram / norm.square()
        product = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) / norm
        for done in range(self.steps):
            if done and done % 5 == 0:
                coefficients = coefficients @ product
                gram = yield coefficients[owned].t() @ coefficients[owned]
                product = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            polynomial.diagonal().add_(a)  # a I + b G + c G^2
            product = product @ polynomial
            gram = polynomial @ gram @ polynomial
        return coefficients @ product

    def columns(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        return []
