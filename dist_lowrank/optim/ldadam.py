"""LDAdam: a subspace that follows the gradient at every step, with error feedback."""

from __future__ import annotations

from typing import Any

from dist_lowrank.optim.projected_adam import ProjectedAdam


class LDAdam(ProjectedAdam):
    """Low-dimensional Adam (arXiv 2410.16103).

        A <- A + E
        P <- qr(B^T B P_before),  B = rho m P_before^T / (1 - b1^(t-1)) + (1 - rho) A         (first: SVD of A)
        a = A P;   E <- A - a P^T + b1 / (1 - b1) (m P_before^T - m' P^T)                       m' = m P_before^T P
        m' and v' are m and v in the new subspace: v' carries the variance, and adds the square of m' back
        W <- (1 - lr wd) W - lr Adam(a; m', v') P^T

    | | |
    |---|---|
    | refresh | every step |
    | side | the shorter axis; square: **left** |
    | epsilon | 1e-8, added after bias correction |
    | decay | before the update |
    | scale | 1 |
    | moments at a refresh | moved (`move_variance`) |
    | state per matrix | 2 L r moments, n r projection, L n error (off: `error_feedback=False`) |
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        *,
        rho: float = 0.908,
        subspace: str = "power",
        error_feedback: bool = True,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"refresh_interval": 1, "transition": "move_variance", "side": "shorter_left"}
        own |= {"subspace": subspace, "rho": rho, "return_momentum": error_feedback}
        own["residual"] = "error_feedback" if error_feedback else "none"
        super().__init__(params, lr=lr, betas=betas, eps=eps, **(own | options))
