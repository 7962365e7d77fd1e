"""Dion: a low-rank factor of the momentum, orthonormal by power iteration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.options import check_number
from dist_lowrank.optim.projections import Projection, RandomProjection
from dist_lowrank.optim.recipe import Recipe, Rounds, Sum, Update
from dist_lowrank.optim.rounding import RowNoise
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.storage import Floats, momentum_storage
from dist_lowrank.optim.subspace import Choice, Place
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule

_EPS = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class DionRecipe(Recipe):
    """Two sums: an r x r Gram matrix, from which each rank orthonormalises its rows, and the n x r right factor."""

    momentum: float
    storage: Floats  # of the momentum and of the right factor

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        check_number("momentum", self.momentum, below=1)

    def check(self, form: TallForm) -> None:
        if form.rank > form.rows:
            raise ValueError(f"rank: {form.rank} is not allowed with side={form.side!r}; allowed: up to {form.rows}")

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        factor = StateTensor(form.rank, self.storage.dtype or dtype, "projection", sharded=False, rows=form.n)
        return {**self.storage.state("momentum", form.n, dtype, "moments"), "projection": factor}

    def rounds(self, form: TallForm, refresh: bool) -> Rounds:
        return [Sum(form.rank**2 + 1, torch.float64), form.n * form.rank]

    def scratch_elements(self, form: TallForm) -> int:
        return 16 * form.rank**2  # the Gram matrix scaled, shifted and factored, in float64

    def rule(self, rows: Tensor, state: Mapping[str, Tensor], step: int, place: Place, noise: RowNoise) -> Rule[Update]:
        momentum = self.storage.read("momentum", state, place.form.n, place.dtype).add_(rows)  # (l, n)
        del rows
        if step == 1:
            drawn = yield from RandomProjection("orthonormal").choose(momentum, {}, place, 0, None)
            assert isinstance(drawn.basis, Projection)
            right = drawn.basis.vectors  # (n, r)
        else:
            right = _without_zeros(state["projection"].to(place.dtype), place)
        product = (momentum @ right).double()  # (l, r)
        owned, energy = product[place.owned], momentum[place.owned].square().sum(dtype=torch.float64)
        total = yield torch.cat([(owned.t() @ owned).flatten(), energy.view(1)])
        del owned
        left = _orthonormal(product, total[:-1].view(place.form.rank, -1), place).to(place.dtype)  # (l, r)
        del product
        right = yield momentum[place.owned].t() @ left[place.owned]  # (n, r)
        momentum.addmm_(left, right.t(), alpha=self.momentum - 1)
        self.storage.write("momentum", momentum, state)
        captured = right.square().sum() / total[-1]
        basis = Projection(right / (torch.linalg.vector_norm(right, dim=0) + _EPS))
        state["projection"].copy_(basis.vectors)
        return Update(left, basis, Choice(basis, captured))


def _without_zeros(right: Tensor, place: Place) -> Tensor:
    """The right factor (n, r), in which columns that are zero are replaced by axes, drawn at random.

    A column is zero if the momentum had less than r directions, and would be for ever.
    """
    n, rank = right.shape
    columns = torch.arange(rank, device=right.device)
    axes = (place.random.at("axes", columns[:1]) + columns) % n  # from a random one on, each once
    drawn = torch.zeros_like(right).scatter_(0, axes.unsqueeze(0), 1.0)
    return torch.where(right.any(dim=0), right, drawn)


def _orthonormal(product: Tensor, gram: Tensor, place: Place) -> Tensor:
    """The factor P of `product = P T` with T upper triangular: orthonormal columns, rows as those at hand.

    From the Gram matrix of all rows alone, which gives the same P as a QR decomposition of them. Columns that depend on
    those before them to the accuracy of the product have no direction of their own; in P they are zero.

    Args:
        product: (l, r), float64.
        gram: (r, r), float64, of all rows.
    """
    # Of columns of length one, what is left without those before them has to be more than this: the rounding of the
    # product, or of the Gram matrix, whose entries are squares.
    least = place.form.n * torch.finfo(place.dtype).eps
    least = max(least, 4 * (place.form.rank * torch.finfo(torch.float64).eps) ** 0.5)
    lengths = gram.diagonal().sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
    unit = gram * scale * scale.unsqueeze(1)
    unit.diagonal().add_(least**2)  # positive definite, also after rounding
    kept = torch.linalg.cholesky_ex(unit, upper=True).L.diagonal() > 2 * least
    scale = torch.where(kept, scale, torch.zeros_like(scale))
    unit = gram * scale * scale.unsqueeze(1)
    unit.diagonal().add_((~kept).to(gram.dtype))
    triangle = torch.linalg.cholesky_ex(unit, upper=True).L
    left: Tensor = torch.linalg.solve_triangular(triangle, product * scale, upper=True, left=False)
    return left


class Dion(LowRankOptimizer):
    """Orthonormalised low-rank momentum with error feedback (arXiv 2504.05295).

    For a matrix in tall form, `A` (L x n), with a right factor `Q` (n x r):

        M <- M + A;   P <- orth(M Q);   R <- M^T P
        M <- M - (1 - mu) P R^T                                        error feedback inside the momentum
        Q <- R / (|R_j| + 1e-8), column by column
        W <- (1 - lr wd) W - lr sqrt(R / C) P Q^T

    | | |
    |---|---|
    | side | the shorter axis is compressed; square: right |
    | state per matrix | momentum, L n numbers; Q, n r numbers |
    | sent per step and matrix | sums of r^2 (float64) and n r numbers; between replicas P, L r |

    The authors (https://github.com/microsoft/dion, commit 0a059a4) orthonormalise by a randomized Cholesky QR, in which
    a random sketch of M Q is decomposed and the result corrected. Every such way gives the one P for which M Q = P T
    with T triangular, but for signs of columns, which cancel in P Q^T; here it is the Cholesky factor of the Gram
    matrix of M Q, summed in float64. They differ where M has less than r directions: the QR decomposition then makes
    up columns of P from rounding, which the normalisation of Q brings to full length; here these columns are zero at
    that step, and their Q is drawn anew for the next. The first Q is uniform on the Stiefel manifold, theirs Gaussian:
    the first P is alike, since both span the same.

    Dense parameters are AdamW with the `dense_` options.

    Args:
        rank: number of directions (int) or fraction of n (float). The authors' default is 1.0, `published("dion")`.
        momentum: mu.
        scale: as `Muon`'s.
        moment_dtype: of M and Q between steps; None: as `state_dtype` says.
        params, lr, weight_decay, side, dense_lr, dense_betas, dense_eps, state_dtype, weight_rounding, seed, engine: as
            `Trion`'s.

    Raises:
        ValueError: for an option that is not allowed, naming it, its value and what is.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        *,
        rank: int | float = 0.25,
        side: str = "shorter",
        scale: str = "fan_ratio",
        moment_dtype: torch.dtype | None = None,
        dense_lr: float = 3e-4,
        dense_betas: tuple[float, float] = (0.9, 0.95),
        dense_eps: float = 1e-8,
        state_dtype: str | None = None,
        weight_rounding: str = "nearest",
        seed: int = 0,
        **engine: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rank": rank,
            "side": side,
            "scale": scale,
            "moment_dtype": moment_dtype,
            "dense_lr": dense_lr,
            "dense_betas": dense_betas,
            "dense_eps": dense_eps,
            "state_dtype": state_dtype,
            "weight_rounding": weight_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults, **engine)

    def recipe(self, group: dict[str, Any]) -> DionRecipe:
        same = ("lr", "weight_decay", "rank", "side", "scale", "weight_rounding", "seed", "momentum")
        return DionRecipe(**{key: group[key] for key in same}, storage=momentum_storage(group))
