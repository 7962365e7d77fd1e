"""APOLLO and APOLLO-Mini: the gradient itself, scaled as Adam would scale a random projection of it."""

from __future__ import annotations

from typing import Any

from dist_lowrank.optim.projected_adam import ProjectedAdam


class Apollo(ProjectedAdam):
    """Channel-wise (or tensor-wise) learning rates from a low-rank Adam (arXiv 2412.05270).

    With `R = A P`, P random with variance 1/r, and Adam's direction psi (before the step's bias correction c):

        s_j = |psi_j| / (|R_j| + 1e-8)           per row of the tall form (`per="tensor"`: one s, of the whole norms)
        U = s A;   U <- U / max(|U| / (1.01 |U before|), 1)
        W <- W - lr c sqrt(scale) U

    | | |
    |---|---|
    | refresh | steps 1, T + 1, ...; T = 200; P is drawn anew |
    | side | the shorter axis; square: right |
    | epsilon | 1e-6, added before bias correction |
    | decay | before the update |
    | scale | root of `scale`: 1; of Mini 128 |
    | moments at a refresh | kept: only norms of rows are made of them, and random directions are all alike |
    | state per matrix | 2 L r moments, 1 integer, 1 norm |

    The published code decays the weights after the update (`decay_last=True`): `published`.
    APOLLO-Mini is `rank=1, per="tensor", scale=128`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        *,
        subspace: str = "gaussian",
        per: str = "channel",
        scale: float = 1.0,
        limit: float = 1.01,
        **options: Any,
    ) -> None:
        own = {"corrected_eps": False, "subspace": subspace, "residual": "gradient_scaled"}
        own |= {"residual_per": per, "residual_scale": scale, "residual_limit": limit}
        super().__init__(params, lr=lr, betas=betas, eps=eps, **(own | options))
