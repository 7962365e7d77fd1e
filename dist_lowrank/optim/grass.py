"""Grass: Adam on the rows of the gradient that are longest."""

from __future__ import annotations

from typing import Any

from dist_lowrank.optim.projected_adam import ProjectedAdam


class Grass(ProjectedAdam):
    """Adam on the r largest rows (or columns) of the gradient; the others stand still (arXiv 2406.17660).

    For a matrix in tall form, `A` (L x n), with I the r columns of A of most energy at a refresh:

        a = A[:, I];   m, v <- Adam's of a
        W[:, I] <- W[:, I] - lr alpha (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)

    | | |
    |---|---|
    | refresh | steps 1, T + 1, 2 T + 1, ...; T = 200 |
    | side | the shorter axis is selected from; square: right |
    | epsilon | 1e-6, added after bias correction, by k, the age of a column |
    | decay | of all of W, before the update |
    | scale | alpha 0.25 |
    | moments at a refresh | moved: a column that stays keeps its moments, a new one starts at zero |
    | state per matrix | 2 L r moments, 2 r integers |

    Of the paper's ways to choose this is the deterministic one, top-r, whose weights rho are 1. Its code was not
    published; the paper is said to start moments anew at a refresh (`transition="reset"`), which forgets, without
    need, what is known of the columns that stay. Learning rate, alpha and epsilon are GaLore's.
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
        own = {"subspace": "identity", "transition": "move", "bias_correction": "choice", "alpha": alpha}
        super().__init__(params, lr=lr, betas=betas, eps=eps, **(own | options))
