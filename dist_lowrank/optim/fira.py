"""Fira: GaLore, and the rest of the gradient scaled as Adam scales its projection."""

from __future__ import annotations

from typing import Any

from dist_lowrank.optim.projected_adam import ProjectedAdam


class Fira(ProjectedAdam):
    """GaLore with a full-rank residual (arXiv 2410.01623).

    With `R = A P` and Adam's direction psi (before the step's bias correction c):

        phi_j = |psi_j| / (|R_j| + 1e-8)                    per row of the tall form
        S_j = phi_j (A - R P^T)_j;   S <- S / max(|S| / (1.01 |S before|), 1)
        W <- W - lr c (alpha psi P^T + S)

    | | |
    |---|---|
    | refresh | steps 1, T + 1, 2 T + 1, ...; T = 200 |
    | side | the shorter axis; square: right |
    | epsilon | 1e-6, added before bias correction |
    | decay | before the update |
    | scale | alpha 0.25 of the direction, S as it is |
    | moments at a refresh | moved: m by the product of the old and the new P, v by its element-wise square |
    | state per matrix | 2 L r moments, n r projection, 1 norm |

    The published code keeps the moments as they are (`transition="keep"`), leaves `1 - alpha` of what is inside the
    subspace in S (`residual_inside=0.75`) and decays the weights after the update (`decay_last=True`): `published`.

    Args:
        residual_inside: part of what is inside the subspace that S keeps: 0 in the paper, `1 - alpha` in its code.
        residual_limit: how much the norm of S may grow in a step; 0: without limit.
        corrected_eps: False by default: phi is made of the uncorrected direction, in the paper as in the code.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        *,
        alpha: float = 0.25,
        residual_inside: float = 0.0,
        residual_limit: float = 1.01,
        **options: Any,
    ) -> None:
        own = {"residual": "norm_scaled", "residual_inside": residual_inside, "residual_limit": residual_limit}
        own |= {"transition": "move", "corrected_eps": False, "alpha": alpha}
        super().__init__(params, lr=lr, betas=betas, eps=eps, **(own | options))
