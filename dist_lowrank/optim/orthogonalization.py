"""Orthogonalising a whole matrix by odd polynomials: `U f(S) V^T` of `U S V^T`, with `f` near 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.optim.options import check_choice, check_count

Polynomial = tuple[float, float, float]  # a x + b x^3 + c x^5

# By method: the polynomials of its steps, of which the last is repeated, and by how much more than its norm a matrix is
# divided at first.
METHODS: Mapping[str, tuple[tuple[Polynomial, ...], float]] = {
    # Of Muon (https://kellerjordan.github.io/posts/muon): singular values end between 0.7 and 1.2.
    "newton_schulz": (((3.4445, -4.7750, 2.0315),), 1.0),
    # Polar Express (arXiv 2505.16932), for five steps: the best polynomial for what each step finds.
    "polar_express": (
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        1.02,
    ),
}
_EPS = 1e-7


@dataclass(frozen=True, slots=True)
class Orthogonalize:
    """Maps matrices (count, L, k) to the same shape and dtype; each by itself, in one call.

    Each step is `X <- a X + (b G + c G^2) X` with `G = X X^T`, on the side where `G` is smaller. Rows and columns of
    zeros stay so, and do not change the others.
    """

    method: str = "newton_schulz"
    steps: int = 5
    dtype: torch.dtype | None = None  # of the matrices, and so of what travels to owners; None: of the arithmetic

    def __post_init__(self) -> None:
        check_choice("orthogonalization", self.method, tuple(METHODS))
        check_count("newton_schulz_steps", self.steps)
        check_choice("newton_schulz_dtype", self.dtype, (None, torch.float32, torch.bfloat16))

    def __call__(self, matrices: Tensor) -> Tensor:
        polynomials, margin = METHODS[self.method]
        tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if tall else matrices
        x = x / torch.linalg.matrix_norm(x, keepdim=True).mul_(margin).add_(_EPS)
        for step in range(self.steps):
            a, b, c = polynomials[min(step, len(polynomials) - 1)]
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x


def orthogonalizer(group: Mapping[str, Any]) -> Orthogonalize:
    """From the options of a parameter group."""
    return Orthogonalize(group["orthogonalization"], group["newton_schulz_steps"], group["newton_schulz_dtype"])
