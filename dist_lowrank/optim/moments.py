"""What happens inside the subspace: from coefficients to a direction."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_lowrank.kernels import products
from dist_lowrank.kernels.adam import adam_direction
from dist_lowrank.optim.options import check_betas, check_choice, check_count, check_number
from dist_lowrank.optim.rounding import RowNoise
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.storage import Floats, Geometric, Storage
from dist_lowrank.optim.subspace import Change, Place
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule

_STEPS_PER_GRAM = 5  # of Newton-Schulz; rounding grows too far after more


class Moments(Protocol):
    """Turns coefficients into a direction of the same shape."""

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        """The state that this part keeps for a matrix, in `dtype` where it does not say another."""

    def statistics(self, form: TallForm) -> list[int]:
        """By round: the number of elements of what `direction` yields."""

    def read(self, state: Mapping[str, Tensor], rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """The moments in the dtype of the arithmetic, (l, r) or (r,); modified in place until `write`."""

    def carry(self, moments: Mapping[str, Tensor], change: Change, transition: str, step: int) -> None:
        """Takes them along when the directions change at a step, in place."""

    def step_factor(self, step: int) -> float:
        """What of the direction is a factor of the step size, for residuals that compare it with the coefficients."""

    def direction(self, coefficients: Tensor, moments: Mapping[str, Tensor], step: int, place: Place) -> Rule[Tensor]:
        """Updates the moments; returns the direction of this rank's rows, (l, r), which may be where coefficients were.

        Yields sums over the rows that this rank owns where it needs totals.
        """

    def mean(self, moments: Mapping[str, Tensor], step: int) -> Tensor:
        """The bias-corrected mean of past coefficients, (l, r), before a step > 1. For subspaces that use momentum."""

    def write(self, moments: Mapping[str, Tensor], state: Mapping[str, Tensor], noise: RowNoise) -> None:
        """Keeps the moments until the next step; `noise` decides where they are rounded at random."""

    def undelivered(self, moments: Mapping[str, Tensor]) -> Tensor | None:
        """What past coefficients would still add to later directions, in their units, (l, r); None without momentum."""


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam on the coefficients (arXiv 1412.6980), bias-corrected by the step or by the age of each column.

    A column that enters at a late step has `|direction| = (1 - b1) / sqrt(1 - b2)` when corrected by the step (3.2 for
    betas (0.9, 0.999), 1.0 for (0.9, 0.99)) and 1 when corrected by its age.

    With int8, both moments are kept with evenly spaced logarithms (`quantization.to_geometric`) down to 2^-16 of the
    largest of a block, the second as its square; so a first moment that is rounded up never meets a square root that
    was rounded to zero, and the direction stays as bounded as it is in float32.
    """

    betas: tuple[float, float]
    eps: float
    column_bias_correction: bool = False
    moment_dtype: torch.dtype | None = None  # None: the dtype of the arithmetic
    corrected_eps: bool = True  # False: added to the root before it is corrected, as the family of GaLore does

    def __post_init__(self) -> None:
        check_betas("betas", self.betas)
        check_number("eps", self.eps)
        check_choice("column_bias_correction", self.column_bias_correction, (False, True))
        check_choice("moment_dtype", self.moment_dtype, (None, torch.float32, torch.bfloat16, torch.int8))

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        tensors: dict[str, StateTensor] = {}
        for name, storage in _storages(self.moment_dtype).items():
            tensors |= storage.state(name, form.rank, dtype, "moments")
        if self.column_bias_correction:
            tensors["age"] = StateTensor(form.rank, torch.int32, "indices", sharded=False)
        return tensors

    def statistics(self, form: TallForm) -> list[int]:
        return []

    def read(self, state: Mapping[str, Tensor], rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        moments = {
            name: storage.read(name, state, rank, dtype) for name, storage in _storages(self.moment_dtype).items()
        }
        if self.column_bias_correction:
            moments["age"] = state["age"]
        return moments

    def carry(self, moments: Mapping[str, Tensor], change: Change, transition: str, step: int) -> None:
        mean, square = moments["exp_avg"], moments["exp_avg_sq"]
        if transition != "move_variance" or step == 1:
            change.carry(transition, [mean], [square, *(moments[key] for key in ("age",) if key in moments)])
            return
        # The variance is carried as a second moment, the mean as a first (LDAdam, arXiv 2410.16103, section 3.2).
        correction1, correction2 = 1 - self.betas[0] ** (step - 1), 1 - self.betas[1] ** (step - 1)
        square.div_(correction2).sub_((mean / correction1).square())
        change.carry("move", [mean], [square])
        square.add_((mean / correction1).square()).abs_().mul_(correction2)

    def step_factor(self, step: int) -> float:
        beta1, beta2 = self.betas
        return 1.0 if self.corrected_eps else (1 - beta2**step) ** 0.5 / (1 - beta1**step)

    def direction(self, coefficients: Tensor, moments: Mapping[str, Tensor], step: int, place: Place) -> Rule[Tensor]:
        yield from ()  # needs no sums
        beta1, beta2 = self.betas
        mean, square = moments["exp_avg"], moments["exp_avg_sq"]  # (l, r)
        if self.column_bias_correction:
            mean.lerp_(coefficients, 1 - beta1)
            square.mul_(beta2).addcmul_(coefficients, coefficients, value=1 - beta2)
            age = moments["age"].add_(1).to(coefficients.dtype)  # (r,)
            return (mean / (1 - beta1**age)).div_((square / (1 - beta2**age)).sqrt_().add_(self.eps))
        # An eps that was added to the root before it is corrected is corrected with it.
        eps = self.eps if self.corrected_eps else self.eps / (1 - beta2**step) ** 0.5
        count = step if place.counter is None else place.counter
        return adam_direction(coefficients, mean, square, count, self.betas, eps)

    def write(self, moments: Mapping[str, Tensor], state: Mapping[str, Tensor], noise: RowNoise) -> None:
        for name, storage in _storages(self.moment_dtype).items():
            storage.write(name, moments[name], state, noise)

    def mean(self, moments: Mapping[str, Tensor], step: int) -> Tensor:
        return moments["exp_avg"] / (1 - self.betas[0] ** (step - 1))

    def undelivered(self, moments: Mapping[str, Tensor]) -> Tensor | None:
        # A coefficient a enters as (1 - b1) a and is delivered in parts (1 - b1) b1^k a, k = 0, 1, ..., a in all.
        return moments["exp_avg"] * (self.betas[0] / (1 - self.betas[0]))


@functools.cache
def _storages(moment_dtype: torch.dtype | None) -> Mapping[str, Storage]:
    if moment_dtype == torch.int8:
        return {"exp_avg": Geometric(signed=True), "exp_avg_sq": Geometric(signed=False)}
    return dict.fromkeys(("exp_avg", "exp_avg_sq"), Floats(moment_dtype))


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

    def statistics(self, form: TallForm) -> list[int]:
        return [form.rank**2] * -(-self.steps // _STEPS_PER_GRAM)

    def read(self, state: Mapping[str, Tensor], rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def carry(self, moments: Mapping[str, Tensor], change: Change, transition: str, step: int) -> None:
        pass

    def step_factor(self, step: int) -> float:
        return 1.0

    def direction(self, coefficients: Tensor, moments: Mapping[str, Tensor], step: int, place: Place) -> Rule[Tensor]:
        a, b, c = self.coefficients
        gram = yield coefficients[place.owned].t() @ coefficients[place.owned]  # (r, r)
        norm = gram.diagonal().sum().sqrt() + self.eps
        gram = gram / norm.square()
        product = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) / norm
        for done in range(self.steps):
            if done and done % _STEPS_PER_GRAM == 0:
                coefficients = products.product(coefficients, product)
                gram = yield coefficients[place.owned].t() @ coefficients[place.owned]
                product = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            polynomial.diagonal().add_(a)  # a I + b G + c G^2
            product = product @ polynomial
            gram = polynomial @ gram @ polynomial
        return products.product(coefficients, product)

    def write(self, moments: Mapping[str, Tensor], state: Mapping[str, Tensor], noise: RowNoise) -> None:
        pass

    def mean(self, moments: Mapping[str, Tensor], step: int) -> Tensor:
        raise ValueError("subspace: 'power' is not allowed with moments that keep no mean; allowed: another subspace")

    def undelivered(self, moments: Mapping[str, Tensor]) -> Tensor | None:
        return None
