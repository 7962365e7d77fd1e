"""SubTrack++: Fira in a subspace that turns towards the gradient, with LDAdam's moments."""

from __future__ import annotations

from typing import Any

from dist_lowrank.optim.projected_adam import ProjectedAdam


class SubTrack(ProjectedAdam):
    """SubTrack++, by the formula of the paper (arXiv 2502.01586).

    At a refresh, with the leading singular triple of the tangent `D = -2 (A - A P P^T)^T A P ~ sigma u v^T`:

        P <- (P v cos(sigma eta) - u sin(sigma eta)) v^T + P (I - v v^T)                     (first: SVD of A)
        m and v follow as LDAdam's: v carries the variance, and adds the square of the moved m back
        W <- W - lr c (alpha psi P^T + S)                                                     S: as Fira's

    | | |
    |---|---|
    | refresh | steps 1, T + 1, 2 T + 1, ...; T = 200 |
    | side | the shorter axis; square: right |
    | epsilon | 1e-6, added before bias correction, as Fira's |
    | decay | before the update |
    | scale | alpha 0.25 of the direction, S as it is |
    | moments at a refresh | moved (`move_variance`) |
    | state per matrix | 2 L r moments, n r projection, 1 norm |

    The published code leaves `1 - alpha` of what is inside the subspace in S (`residual_inside=0.75`) and decays after
    the update (`decay_last=True`): `published`. No option reproduces the rest: of matrices with at least as many rows
    as columns its tangent is zero, so that they keep their first subspace (`grassmann_step=0` does); moments are moved
    a step before their subspace, always from the first one, and second moments times 1 - b2. Its numbers are not these.

    Args:
        grassmann_step: eta. The angle is `sigma eta`, and sigma, at most `|A|^2`, goes with the square of the gradient
            as it comes, clipped and averaged. The paper says 10000, its scripts 10. The default is 10: in a small
            model with gradients clipped at 1, where sigma was 1e-4 to 1e-2, it turns by up to 0.1, and 10000 would
            turn round many times, which is no descent.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        *,
        alpha: float = 0.25,
        grassmann_step: float = 10.0,
        residual_limit: float = 1.01,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"subspace": "grassmann", "grassmann_step": grassmann_step, "transition": "move_variance"}
        own |= {"residual": "norm_scaled", "residual_limit": residual_limit, "corrected_eps": False, "alpha": alpha}
        super().__init__(params, lr=lr, betas=betas, eps=eps, **(own | options))
