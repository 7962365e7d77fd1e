"""Slow, independent references of Muon, Dion and Dion3: float64, one matrix at a time, in the space of the weights.

On purpose unlike the package: the polynomials act on singular values, Dion orthonormalises by Householder reflections,
Dion3 works on rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

POLYNOMIALS = {
    "newton_schulz": [(3.4445, -4.7750, 2.0315)] * 20,
    "polar_express": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        *[(2.3465413258596377, -1.7097828382687081, 0.42323551169305323)] * 16,
    ],
}
SCALES: dict[str, Callable[[int, int], float]] = {
    "none": lambda rows, columns: 1.0,
    "spectral": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "fan_ratio": lambda rows, columns: (rows / columns) ** 0.5,
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
}


def orthogonalized(matrix: Tensor, method: str, steps: int) -> Tensor:
    """`U f(S) V^T`, f the composition of the polynomials."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / (matrix.norm() * {"newton_schulz": 1.0, "polar_express": 1.02}[method] + 1e-7)
    for a, b, c in POLYNOMIALS[method][:steps]:
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


class _Reference:
    def __init__(self, weight: Tensor, lr: float, momentum: float, weight_decay: float, scale: str) -> None:
        self.weight = weight.detach().double().clone()
        self.lr, self.mu, self.weight_decay, self.scale = lr, momentum, weight_decay, scale
        self.M = torch.zeros_like(self.weight)

    def move(self, update: Tensor) -> None:
        rows, columns = self.weight.shape
        self.weight *= 1 - self.lr * self.weight_decay
        self.weight -= self.lr * SCALES[self.scale](rows, columns) * update


class ReferenceMuonMatrix(_Reference):
    """As Keller Jordan writes it: an average, and with nesterov a look ahead."""

    def __init__(
        self,
        weight: Tensor,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        scale: str = "spectral",
        orthogonalization: str = "newton_schulz",
        newton_schulz_steps: int = 5,
    ) -> None:
        super().__init__(weight, lr, momentum, weight_decay, scale)
        self.nesterov, self.method, self.steps = nesterov, orthogonalization, newton_schulz_steps

    def step(self, gradient: Tensor) -> None:
        gradient = gradient.double()
        self.M = self.mu * self.M + (1 - self.mu) * gradient
        update = self.mu * self.M + (1 - self.mu) * gradient if self.nesterov else self.M
        self.move(orthogonalized(update, self.method, self.steps))


class ReferenceDion(_Reference):
    """In tall form; `right` is the first right factor, (n, r)."""

    def __init__(
        self,
        weight: Tensor,
        right: Tensor,
        *,
        left_side: bool,
        lr: float = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        scale: str = "fan_ratio",
    ) -> None:
        super().__init__(weight, lr, momentum, weight_decay, scale)
        self.Q, self.left_side = right, left_side

    def step(self, gradient: Tensor) -> None:
        self.M += gradient.double()
        tall = self.M.T if self.left_side else self.M
        P = torch.from_numpy(np.linalg.qr((tall @ self.Q).numpy())[0])
        R = tall.T @ P
        tall = tall - (1 - self.mu) * P @ R.T
        self.M = tall.T.clone() if self.left_side else tall
        self.Q = R / (R.norm(dim=0) + 1e-8)
        update = P @ self.Q.T
        self.move(update.T if self.left_side else update)


class ReferenceDion3(_Reference):
    """Rows of the weights are neurons; `neuron_beta=None` is Dion2."""

    def __init__(
        self,
        weight: Tensor,
        *,
        count: int,
        lr: float = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        neuron_beta: float | None = 0.95,
        scale: str = "fan_ratio",
        orthogonalization: str = "polar_express",
        newton_schulz_steps: int = 5,
    ) -> None:
        super().__init__(weight, lr, momentum, weight_decay, scale)
        self.count, self.beta = count, neuron_beta
        self.method, self.steps = orthogonalization, newton_schulz_steps
        self.v = torch.zeros(len(weight), dtype=torch.float64)

    def step(self, gradient: Tensor) -> None:
        self.M += gradient.double()
        sizes = self.M.abs().sum(dim=1).tolist()
        chosen = sorted(sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))[: self.count])
        U = orthogonalized(self.M[chosen], self.method, self.steps)
        self.M[chosen] *= self.mu
        if self.beta is not None:
            self.v[chosen] = self.beta * self.v[chosen] + (1 - self.beta) * U.square().mean(dim=1)
            normalized = U / (self.v[chosen].sqrt() + 1e-8)[:, None]
            U = normalized * U.norm() / normalized.norm()
        update = torch.zeros_like(self.weight)
        update[chosen] = U
        self.move(update)
