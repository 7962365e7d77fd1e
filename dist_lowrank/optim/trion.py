"""Trion: orthogonalised low-rank momentum on selected dictionary columns (ICLR 2026, arXiv 2505.17967 v4)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from dist_lowrank.optim.engine import VERIFY_EVERY, WORKSPACE_BYTES, LowRankOptimizer
from dist_lowrank.optim.low_rank import LowRank, column_options
from dist_lowrank.optim.moments import NewtonSchulz
from dist_lowrank.optim.residuals import Accumulate


class Trion(LowRankOptimizer):
    """Newton-Schulz on the r dictionary columns of the momentum that hold most of its energy.

    For a matrix in tall form, `A` (L x n), with dictionary `D`:

        B <- M + A
        I <- the r columns of B D of most energy;   b <- (B D)[:, I]
        M <- B - (1 - mu) b D_I^T                      error feedback inside the momentum
        W <- (1 - lr wd) W - lr s(R, C) NewtonSchulz(b) D_I^T

    State per matrix: the whole momentum (kept as `M D`, L x n) and r integers: as much as Muon, not less. What is low
    in rank is the orthogonalisation and what replicas exchange. Dense parameters are AdamW with the `dense_`
    options.

    Args:
        params: tensors, named tensors or groups; every option can differ per group.
        lr, momentum, weight_decay: of matrices. `weight_decay` also holds for the dense path.
        rank, dictionary, dictionary_interval, transform, materialize, transform_precision, ranking, side, state_dtype,
            weight_rounding, capturable, seed, process_group, workspace_bytes, verify_every, agree_on_gradients: as
            `DCTAdamW`'s. Columns are chosen at every step.
        newton_schulz_steps: quintic steps with coefficients (3.4445, -4.7750, 2.0315).
        scale: of the step: `spectral`, max(1, sqrt(R / C)); `match_rms_adamw`, 0.2 sqrt(max(R, C)); `none`, 1.
        dense_lr, dense_betas, dense_eps: of AdamW on the dense path. Schedulers change `lr`; `dense_lr` follows in
            proportion to what `lr` was when its group was added.

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
        dictionary: str = "dct2",
        dictionary_interval: int = 500,
        transform: str = "gemm",
        materialize: bool = True,
        transform_precision: str = "fp32",
        ranking: str = "l2",
        side: str = "shorter",
        newton_schulz_steps: int = 5,
        scale: str = "spectral",
        dense_lr: float = 3e-4,
        dense_betas: tuple[float, float] = (0.9, 0.95),
        dense_eps: float = 1e-8,
        state_dtype: str | None = None,
        weight_rounding: str = "nearest",
        capturable: bool = False,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
        workspace_bytes: int = WORKSPACE_BYTES,
        verify_every: int = VERIFY_EVERY,
        agree_on_gradients: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rank": rank,
            "dictionary": dictionary,
            "dictionary_interval": dictionary_interval,
            "transform": transform,
            "materialize": materialize,
            "transform_precision": transform_precision,
            "ranking": ranking,
            "side": side,
            "newton_schulz_steps": newton_schulz_steps,
            "scale": scale,
            "dense_lr": dense_lr,
            "dense_betas": dense_betas,
            "dense_eps": dense_eps,
            "state_dtype": state_dtype,
            "weight_rounding": weight_rounding,
            "capturable": capturable,
            "seed": seed,
        }
        super().__init__(
            params,
            defaults,
            process_group=process_group,
            workspace_bytes=workspace_bytes,
            verify_every=verify_every,
            agree_on_gradients=agree_on_gradients,
        )

    def recipe(self, group: dict[str, Any]) -> LowRank:
        return LowRank(
            **column_options(group),
            refresh_interval=1,
            moments=NewtonSchulz(group["newton_schulz_steps"]),
            residual=Accumulate("momentum", "moments", keep=group["momentum"]),
            scale=group["scale"],
        )
