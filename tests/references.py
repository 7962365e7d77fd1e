"""Slow, independent references of the optimizers: plain float64, one matrix at a time, in the space of the weights.

Written from the published formulas. On purpose unlike the package wherever both are right: a dense dictionary from
scipy, residual and momentum as matrices in space (not in dictionary coordinates), moments moved by the dense product
`D_prev^T D_cur`, Newton-Schulz on the factor itself (not on its Gram matrix).
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import scipy.linalg
import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def dense_dictionary(name: str, n: int) -> Tensor:
    """The `n x n` matrix whose columns are the dictionary `name`, float64. `random` has no formula and is refused."""
    unit = np.eye(n)
    if name == "dct2":  # a row times this matrix is the orthonormal DCT-II of the row
        matrix = scipy.fft.dct(unit, type=2, norm="ortho", axis=1)
    elif name == "dct3":
        matrix = scipy.fft.dct(unit, type=3, norm="ortho", axis=1)
    elif name == "hadamard":
        block = next(size for size in (2**i for i in range(20, -1, -1)) if n % size == 0)
        matrix = np.kron(np.eye(n // block), scipy.linalg.hadamard(block) / np.sqrt(block))
    elif name == "identity":
        matrix = unit
    else:
        raise ValueError(name)
    return torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float64))


def compresses_columns(shape: tuple[int, int], side: str) -> bool:
    """Whether `side` compresses axis 1 (right) of a matrix of this shape, rather than axis 0 (left)."""
    rows, columns = shape
    return {"shorter": rows >= columns, "longer": rows < columns, "right": True, "left": False}[side]


def rank_of(rank: float, n: int) -> int:
    """An int is a number of columns, a float a fraction of `n` (half to even); clamped to 1..n."""
    return min(n, max(1, rank if isinstance(rank, int) else round(rank * n)))


def select(coordinates: Tensor, rank: int, ranking: str) -> list[int]:
    """Indices of the `rank` columns with the largest norm, ascending; ties go to the lowest index."""
    power = {"l1": 1, "l2": 2}[ranking]
    scores = coordinates.abs().pow(power).sum(dim=0).tolist()
    return sorted(sorted(range(len(scores)), key=lambda k: (-scores[k], k))[:rank])


def newton_schulz(factor: Tensor, steps: int) -> Tensor:
    """Muon's quintic iteration in its usual form, on the orientation with fewer rows than columns."""
    a, b, c = NEWTON_SCHULZ
    x = factor / (factor.norm() + 1e-7)
    transposed = x.shape[0] > x.shape[1]
    if transposed:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if transposed else x


def quantized_rows(values: Tensor, bits: int) -> Tensor:
    """Asymmetric min-max, one bucket per row: u = (max - min) / levels, x' = floor((x - min) / u + 0.5) u + min.

    Least value and step are kept in float32.
    """
    rows = []
    for row in values.numpy():
        least = np.float64(np.float32(row.min()))
        step = np.float64(np.float32((row.max() - least) / (2**bits - 1)))
        rows.append(row if step == 0 else np.floor((row - least) / step + 0.5) * step + least)
    return torch.from_numpy(np.stack(rows))


class ReferenceAdamW:
    """Decoupled AdamW (arXiv 1711.05101)."""

    def __init__(
        self,
        weight: Tensor,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.weight = weight.detach().double().clone()
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.t = 0
        self.m = torch.zeros_like(self.weight)
        self.v = torch.zeros_like(self.weight)

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        b1, b2 = self.betas
        self.weight = (1 - self.lr * self.weight_decay) * self.weight
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient**2
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        self.weight = self.weight - self.lr * m_hat / (v_hat.sqrt() + self.eps)


class _ReferenceMatrix:
    """What both low-rank references share: the tall form, the dictionary, the selection."""

    def __init__(
        self,
        weight: Tensor,
        rank: float,
        dictionary: str | Tensor,
        ranking: str,
        side: str,
    ) -> None:
        self.weight = weight.detach().double().clone()
        self.right = compresses_columns(tuple(weight.shape), side)
        self.L, self.n = weight.shape if self.right else tuple(reversed(weight.shape))
        self.r = rank_of(rank, self.n)
        self.D = dictionary if isinstance(dictionary, Tensor) else dense_dictionary(dictionary, self.n)  # (n, n)
        self.ranking = ranking
        self.indices: list[int] = []
        self.basis = torch.zeros(self.n, self.r, dtype=torch.float64)  # the columns of D at `indices`
        self.t = 0

    def tall(self, matrix: Tensor) -> Tensor:
        """(R, C) to (L, n)."""
        return matrix if self.right else matrix.T

    def untall(self, matrix: Tensor) -> Tensor:
        """(L, n) to (R, C)."""
        return matrix if self.right else matrix.T


class ReferenceDCTAdamW(_ReferenceMatrix):
    """AdamW in the span of the `rank` dictionary columns that hold most of the gradient (arXiv 2505.17967)."""

    def __init__(
        self,
        weight: Tensor,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: float = 0.25,
        refresh_interval: int = 1,
        dictionary: str | Tensor = "dct2",
        ranking: str = "l2",
        side: str = "shorter",
        transition: str = "move",
        error_feedback: str = "none",
        error_feedback_momentum: bool = False,
        column_bias_correction: bool = False,
    ) -> None:
        super().__init__(weight, rank, dictionary, ranking, side)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.refresh_interval = refresh_interval
        self.transition = transition
        self.error_feedback = error_feedback
        self.error_feedback_momentum = error_feedback_momentum
        self.column_bias_correction = column_bias_correction
        self.m = torch.zeros(self.L, self.r, dtype=torch.float64)
        self.v = torch.zeros(self.L, self.r, dtype=torch.float64)
        self.age = torch.zeros(self.r, dtype=torch.float64)
        self.error = torch.zeros_like(self.weight)  # (R, C), in space

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        b1, b2 = self.betas
        self.weight = (1 - self.lr * self.weight_decay) * self.weight

        A = self.tall(gradient.double() + self.error)  # (L, n)
        returned = torch.zeros_like(A)
        if self.t == 1 or self.t % self.refresh_interval == 0:
            previous = self.basis
            self.indices = select(A @ self.D, self.r, self.ranking)
            self.basis = self.D[:, self.indices]
            if self.t > 1:
                before = self.m @ previous.T
                self._carry_moments(previous)
                if self.error_feedback_momentum:  # LDAdam's generalised error feedback (arXiv 2410.16103)
                    returned = b1 / (1 - b1) * (before - self.m @ self.basis.T)
        basis = self.basis
        a = A @ basis  # (L, r)
        if self.error_feedback != "none":
            self.error = self.untall(self._as_stored(A - a @ basis.T + returned))

        self.m = b1 * self.m + (1 - b1) * a
        self.v = b2 * self.v + (1 - b2) * a * a
        self.age = self.age + 1
        count = self.age if self.column_bias_correction else torch.full_like(self.age, self.t)
        u = (self.m / (1 - b1**count)) / ((self.v / (1 - b2**count)).sqrt() + self.eps)
        self.weight = self.weight - self.lr * self.untall(u @ basis.T)

    def _as_stored(self, error: Tensor) -> Tensor:
        """An error (L, n) in space as its coordinates come back from storage."""
        if self.error_feedback in ("int8", "int4"):
            return quantized_rows(error @ self.D, int(self.error_feedback.removeprefix("int"))) @ self.D.T
        if self.error_feedback == "bf16":
            return (error @ self.D).bfloat16().double() @ self.D.T
        return error

    def _carry_moments(self, previous: Tensor) -> None:
        if self.transition == "move":
            rotation = previous.T @ self.basis  # (r, r); of one dictionary, zeros and ones
            self.m = self.m @ rotation
            self.v = self.v @ rotation**2
            self.age = (self.age @ rotation).round()
        elif self.transition == "reset":
            self.m, self.v, self.age = (torch.zeros_like(x) for x in (self.m, self.v, self.age))


class ReferenceTrion(_ReferenceMatrix):
    """Heavy-ball momentum whose `rank` strongest dictionary columns are orthogonalised (arXiv 2505.17967)."""

    def __init__(
        self,
        weight: Tensor,
        *,
        lr: float = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        rank: float = 0.25,
        dictionary: str | Tensor = "dct2",
        ranking: str = "l2",
        side: str = "shorter",
        newton_schulz_steps: int = 5,
        scale: str = "spectral",
    ) -> None:
        super().__init__(weight, rank, dictionary, ranking, side)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.newton_schulz_steps = newton_schulz_steps
        rows, columns = weight.shape
        self.scale = {
            "spectral": max(1.0, (rows / columns) ** 0.5),
            "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
            "none": 1.0,
        }[scale]
        self.M = torch.zeros(self.L, self.n, dtype=torch.float64)  # in space

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        B = self.M + self.tall(gradient.double())  # (L, n)
        self.indices = select(B @ self.D, self.r, self.ranking)
        basis = self.D[:, self.indices]  # (n, r)
        b = B @ basis  # (L, r)
        self.M = B - (1 - self.momentum) * b @ basis.T
        o = newton_schulz(b, self.newton_schulz_steps)  # (L, r)
        update = self.untall(o @ basis.T)
        self.weight = (1 - self.lr * self.weight_decay) * self.weight - self.lr * self.scale * update


class ReferenceMuon:
    """Muon with heavy-ball momentum (M <- mu M + G) and without Nesterov, on the whole matrix."""

    def __init__(self, weight: Tensor, *, lr: float, momentum: float, weight_decay: float, scale: float) -> None:
        self.weight = weight.detach().double().clone()
        self.lr, self.momentum, self.weight_decay, self.scale = lr, momentum, weight_decay, scale
        self.M = torch.zeros_like(self.weight)

    def step(self, gradient: Tensor) -> None:
        self.M = self.momentum * self.M + gradient.double()
        update = newton_schulz(self.M, steps=5)
        self.weight = (1 - self.lr * self.weight_decay) * self.weight - self.lr * self.scale * update


def prescribed_gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Tensor]:
    """Random float64 gradients with a part that persists, so that some columns stay selected and others come and go."""
    generator = torch.Generator().manual_seed(1000 * seed + sum((i + 1) * s for i, s in enumerate(shape)))

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    persistent = draw()
    return [0.7 * persistent + draw() for _ in range(steps)]


def initial_weight(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A float64 weight of this shape, the same at every call."""
    generator = torch.Generator().manual_seed(7 + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
