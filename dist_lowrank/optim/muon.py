"""Muon: momentum, orthogonalised matrix by matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.options import check_choice, check_number
from dist_lowrank.optim.orthogonalization import Orthogonalize, orthogonalizer
from dist_lowrank.optim.recipe import Recipe, Rounds, Update, Whole
from dist_lowrank.optim.rounding import RowNoise
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.storage import Floats, momentum_storage
from dist_lowrank.optim.subspace import Place
from dist_lowrank.optim.whole import WholeRows
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import OnOwner, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class MuonRecipe(Recipe):
    """The owner of a matrix gets its rows of the momentum and orthogonalises; matrices of one shape in one call."""

    momentum: float
    nesterov: bool
    orthogonalize: Orthogonalize
    storage: Floats  # of the momentum
    rank: int | float = 1.0

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        check_number("momentum", self.momentum, below=1)
        check_choice("nesterov", self.nesterov, (False, True))

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        return self.storage.state("momentum", form.n, dtype, "moments")

    def rounds(self, form: TallForm, refresh: bool) -> Rounds:
        return [Whole(form.n, self.orthogonalize.dtype)]

    def rule(self, rows: Tensor, state: Mapping[str, Tensor], step: int, place: Place, noise: RowNoise) -> Rule[Update]:
        momentum = self.storage.read("momentum", state, place.form.n, place.dtype)
        momentum.lerp_(rows, 1 - self.momentum)
        self.storage.write("momentum", momentum, state)
        direction = rows.lerp(momentum, self.momentum) if self.nesterov else momentum
        del rows, momentum  # neither is needed while owners work
        direction = yield OnOwner(direction.to(self.orthogonalize.dtype or place.dtype), self.orthogonalize)
        return Update(direction.to(place.dtype), WholeRows())


class Muon(LowRankOptimizer):
    """Momentum orthogonalised by Newton-Schulz (https://github.com/KellerJordan/Muon, commit 857d1ad).

        M <- M + (1 - mu) (G - M);   U = G + mu (M - G) with nesterov, else M
        W <- (1 - lr wd) W - lr s(R, C) NewtonSchulz(U)

    | | |
    |---|---|
    | state per matrix | momentum, R C numbers |
    | sent per step and matrix | U to its owner and the result back, R C / ranks numbers each way per rank |

    Others write the momentum as `M <- mu M + G` (torch's docstring, Moonshot, arXiv 2502.16982): that is the same
    optimizer, since orthogonalising does not see the factor 1 / (1 - mu). Keller Jordan's code iterates in bfloat16
    (`newton_schulz_dtype`), which halves what is sent and rounds each of its singular values by some 1 %; the default,
    the dtype of the arithmetic, is the same to rounding under every sharding. `published("muon")` has his choices.

    Dense parameters are AdamW with the `dense_` options.

    Args:
        params: tensors, named tensors or groups; every option can differ per group. Fused weights should be split
            (`split`), so that each matrix is orthogonalised by itself.
        lr, momentum, weight_decay: of matrices. `weight_decay` also holds for the dense path.
        scale: of the step: `spectral`, max(1, sqrt(R / C)); `match_rms_adamw`, 0.2 sqrt(max(R, C)) (Moonshot);
            `fan_ratio`, sqrt(R / C) (Dion's repository); `none`, 1.
        orthogonalization: `newton_schulz`, with coefficients (3.4445, -4.7750, 2.0315), or `polar_express`
            (arXiv 2505.16932).
        side: which axis is cut into rows; `right`, axis 0. No number depends on it, only what is sent: `left` is less
            for parameters sharded along dimension 1.
        moment_dtype: of the momentum between steps; None: as `state_dtype` says.
        dense_lr, dense_betas, dense_eps, state_dtype, weight_rounding, seed: as `Trion`'s.
        engine: process_group, workspace_bytes, verify_every, agree_on_gradients: as `DCTAdamW`'s. Owners work wave by
            wave: unless the workspace holds as many matrices as there are ranks (about ten times the largest matrix),
            some ranks have nothing to compute.

    Raises:
        ValueError: for an option that is not allowed, naming it, its value and what is.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        scale: str = "spectral",
        orthogonalization: str = "newton_schulz",
        newton_schulz_steps: int = 5,
        newton_schulz_dtype: torch.dtype | None = None,
        side: str = "right",
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
            "nesterov": nesterov,
            "scale": scale,
            "orthogonalization": orthogonalization,
            "newton_schulz_steps": newton_schulz_steps,
            "newton_schulz_dtype": newton_schulz_dtype,
            "side": side,
            "moment_dtype": moment_dtype,
            "dense_lr": dense_lr,
            "dense_betas": dense_betas,
            "dense_eps": dense_eps,
            "state_dtype": state_dtype,
            "weight_rounding": weight_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults, **engine)

    def recipe(self, group: dict[str, Any]) -> MuonRecipe:
        same = ("lr", "weight_decay", "side", "scale", "weight_rounding", "seed", "momentum", "nesterov")
        return MuonRecipe(
            **{key: group[key] for key in same},
            orthogonalize=orthogonalizer(group),
            storage=momentum_storage(group),
        )
