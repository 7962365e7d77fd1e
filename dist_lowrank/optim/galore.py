"""GaLore and its descendants that only choose other directions: GaLore 2, GoLore."""

from __future__ import annotations

from typing import Any

from dist_lowrank.optim.projected_adam import ProjectedAdam


class GaLore(ProjectedAdam):
    """Adam on the gradient's projection on its leading singular vectors (arXiv 2403.03507).

    For a matrix in tall form, `A` (L x n), with `P` (n x r) the leading right singular vectors of A at a refresh:

        R = A P;   m, v <- Adam's of R;   W <- W - lr alpha (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) P^T

    | | |
    |---|---|
    | refresh | steps 1, T + 1, 2 T + 1, ...; T = 200 |
    | side | the shorter axis is compressed; square: right |
    | epsilon | 1e-6, added after bias correction |
    | decay | before the update |
    | scale | alpha 0.25 |
    | moments at a refresh | moved: m by the product of the old and the new P, v by its element-wise square |
    | state per matrix | 2 L r moments, n r projection |

    The published code keeps the moments as they are (`transition="keep"`), adds eps to the root of v before bias
    correction (`corrected_eps=False`) and decays the weights after the update (`decay_last=True`): `published`.
    `subspace="randomized_svd"` is GaLore 2 (arXiv 2504.20437); a dictionary's name is the drop-in of arXiv 2505.17967.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        *,
        alpha: float = 0.25,
        **options: Any,
    ) -> None:
        own = {"transition": "move", "alpha": alpha}
        super().__init__(params, lr=lr, betas=betas, eps=eps, **(own | options))


class GoLore(ProjectedAdam):
    """GaLore, with random subspaces from `switch_step` on (arXiv 2410.11289).

    The authors switch after 80 % of the steps. Random subspaces are uniform on the Stiefel manifold, drawn anew at each
    refresh. All else, and where the published code differs, is as `GaLore`'s, but for the learning rate; the code means
    to move the first moments, and drops the result.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        *,
        switch_step: int,
        alpha: float = 0.25,
        **options: Any,
    ) -> None:
        own = {"subspace": "svd_then_stiefel", "switch_step": switch_step, "transition": "move", "alpha": alpha}
        super().__init__(params, lr=lr, betas=betas, eps=eps, **(own | options))
