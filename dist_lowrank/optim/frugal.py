"""FRUGAL: Adam inside a subspace, steps of signs outside."""

from __future__ import annotations

from typing import Any

from dist_lowrank.optim.projected_adam import ProjectedAdam


class Frugal(ProjectedAdam):
    """Adam on r directions, signSGD on the rest (arXiv 2411.07837).

        W <- (1 - lr wd) W - lr (Adam(A P) P^T + residual_scale sign(A - A P P^T))

    | | |
    |---|---|
    | refresh | steps 1, T + 1, ...; T = 200 |
    | directions | `coordinates`: r columns at random (the paper's columns); `svd`, `stiefel`, a dictionary; `blocks` |
    | side | the shorter axis; square: right |
    | epsilon | 1e-8, added after bias correction |
    | decay | before the update |
    | scale | 1, and `residual_scale` of the signs (the authors: 1 for pre-training, 0.1 for fine-tuning) |
    | moments and their bias correction at a refresh | start anew |
    | state per matrix | 2 L r moments, 1 integer or n r projection |

    The published code chooses whole matrices (`subspace="blocks"`: `published`): `round(rank * count)` at a time, in
    `block_order`, have Adam on all of their entries, which takes 2 L n of state, and the others take steps of signs.
    The turns are told from seed and step. Memory of moments comes and goes with them. Only reading a
    torch.distributed.checkpoint takes room for all moments for a while, and an optimizer that made no step yet.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        subspace: str = "coordinates",
        residual_scale: float = 1.0,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"transition": "reset", "bias_correction": "choice", "subspace": subspace}
        own |= {"residual": "sign", "residual_scale": residual_scale}
        super().__init__(params, lr=lr, betas=betas, eps=eps, **(own | options))
