"""Slow, independent references of SCALE, Adafactor, CAME, SMMF and 8-bit AdamW: float64, one matrix at a time."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def mean_square_root(values: Tensor, dim: int | None = None) -> Tensor:
    squares = values**2
    return squares.mean().sqrt() if dim is None else squares.mean(dim=dim, keepdim=True).sqrt()


def root_of_factored(rows: Tensor, columns: Tensor) -> Tensor:
    """The root of `rows columns^T / mean(rows)`, (m, n), of means (m,) and (n,)."""
    return (torch.outer(rows, columns) / rows.mean()).sqrt()


class ReferenceSCALE:
    """arXiv 2506.16659, algorithm 1: one rule for hidden matrices, one for the embedding, one for the head."""

    def __init__(self, weight: Tensor, *, lr: float, weight_decay: float, momentum: float, role: str | None) -> None:
        self.weight = weight.double().clone()
        self.lr, self.weight_decay, self.b, self.role = lr, weight_decay, momentum, role
        self.momentum = torch.zeros_like(self.weight)

    def step(self, gradient: Tensor) -> None:
        self.weight = self.weight - self.lr * self.weight_decay * self.weight
        if self.role in ("head", "tied"):
            self.momentum = self.b * self.momentum + (1 - self.b) * gradient
            gradient = self.momentum
        size = mean_square_root(gradient, dim=0 if self.role == "embedding" else 1)
        self.weight = self.weight - self.lr * gradient / size.clamp(min=1e-8)


class ReferenceAdafactor:
    """arXiv 1804.04235, algorithm 4, with a given learning rate and the clipping of its section 6."""

    def __init__(
        self, weight: Tensor, *, lr: float, weight_decay: float, beta1: float | None = None, decay_rate: float = -0.8
    ) -> None:
        self.weight = weight.double().clone()
        self.lr, self.weight_decay, self.beta1, self.decay_rate = lr, weight_decay, beta1, decay_rate
        self.rows, self.columns = (torch.zeros(size, dtype=torch.float64) for size in weight.shape)
        self.momentum = torch.zeros_like(self.weight)
        self.t = 0

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        beta2 = 1 - self.t**self.decay_rate
        self.rows = beta2 * self.rows + (1 - beta2) * (gradient**2 + 1e-30).mean(dim=1)
        self.columns = beta2 * self.columns + (1 - beta2) * (gradient**2 + 1e-30).mean(dim=0)
        update = gradient / root_of_factored(self.rows, self.columns)
        update = update / max(1.0, float(mean_square_root(update)))
        if self.beta1 is not None:
            self.momentum = self.beta1 * self.momentum + (1 - self.beta1) * update
            update = self.momentum
        self.weight = self.weight - self.lr * self.weight_decay * self.weight - self.lr * update


class ReferenceCAME:
    """arXiv 2307.02047, algorithm 2."""

    def __init__(self, weight: Tensor, *, lr: float, weight_decay: float, betas: tuple[float, float, float]) -> None:
        self.weight = weight.double().clone()
        self.lr, self.weight_decay, self.betas = lr, weight_decay, betas
        self.momentum = torch.zeros_like(self.weight)
        self.square, self.distance = (
            [torch.zeros(size, dtype=torch.float64) for size in weight.shape] for _ in range(2)
        )

    def _follow(self, factors: list[Tensor], squares: Tensor, beta: float) -> Tensor:
        for axis, factor in enumerate(factors):
            factor.mul_(beta).add_((1 - beta) * squares.mean(dim=1 - axis))
        return root_of_factored(*factors)

    def step(self, gradient: Tensor) -> None:
        b1, b2, b3 = self.betas
        self.weight = (1 - self.lr * self.weight_decay) * self.weight
        update = gradient / self._follow(self.square, gradient**2 + 1e-30, b2)
        update = update / max(1.0, float(mean_square_root(update)))
        self.momentum = b1 * self.momentum + (1 - b1) * update
        instability = self._follow(self.distance, (update - self.momentum) ** 2 + 1e-16, b3)
        self.weight = self.weight - self.lr * self.momentum / instability


class ReferenceSMMF:
    """arXiv 2412.08894, algorithms 1 to 4."""

    def __init__(self, weight: Tensor, *, lr: float, weight_decay: float, gamma: float = -0.5) -> None:
        self.weight = weight.double().clone()
        self.lr, self.weight_decay, self.gamma = lr, weight_decay, gamma
        elements = weight.numel()
        pairs = [(elements // b, b) for b in range(1, elements + 1) if elements % b == 0 and b * b <= elements]
        self.shape = min(pairs, key=lambda pair: pair[0] - pair[1])
        self.factors = [torch.zeros(size, dtype=torch.float64) for size in 2 * self.shape]
        self.positive = torch.zeros(self.shape, dtype=torch.bool)
        self.t = 0

    @staticmethod
    def _compress(matrix: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = matrix.sum(dim=1), matrix.sum(dim=0)
        total = float(columns.sum())
        return rows, columns / total if total else columns

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        self.weight = (1 - self.lr * self.weight_decay) * self.weight
        gradient = gradient.reshape(self.shape)
        b1, b2 = 0.9 * 0.999 ** (self.t - 1), 1 - self.t**self.gamma
        signs = 2 * self.positive.double() - 1
        mean = b1 * signs * torch.outer(*self.factors[:2]) + (1 - b1) * gradient
        square = b2 * torch.outer(*self.factors[2:]) + (1 - b2) * gradient**2
        self.positive = mean > 0
        self.factors = [*self._compress(mean.abs()), *self._compress(square)]
        update = mean / (square.sqrt() + 1e-8)
        self.weight = self.weight - self.lr * update.reshape(self.weight.shape)


def dynamic_code(signed: bool) -> np.ndarray:
    """arXiv 2110.02861, section 2.2: an exponent in unary, and the rest of the byte a fraction between 0.1 and 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        borders = np.linspace(0.1, 1, (2**exponent if signed else 2 * 2**exponent) + 1)
        fractions = (borders[1:] + borders[:-1]) / 2 * 10.0 ** (exponent - 6)
        values += [*fractions, *(-fractions if signed else [])]
    assert len(values) == 256
    return np.sort(np.array(values, dtype=np.float32)).astype(np.float64)


def coded(matrix: Tensor, signed: bool) -> Tensor:
    """What is left of a matrix in 8 bits: in blocks of 256 along each row, over the largest of the block."""
    code, result = dynamic_code(signed), matrix.numpy().copy()
    for row in result:
        for start in range(0, len(row), 256):
            block = row[start : start + 256]
            scale = np.float64(np.float32(max(np.abs(block).max(), 1e-12)))
            nearest = np.abs(code[None, :] - (block / scale)[:, None]).argmin(axis=1)
            block[:] = code[nearest] * scale
    return torch.from_numpy(result)


class ReferenceAdamW8bit:
    """AdamW whose moments pass through 8 bits between steps, where a matrix has 4096 elements."""

    def __init__(self, weight: Tensor, *, lr: float, weight_decay: float) -> None:
        self.weight = weight.double().clone()
        self.lr, self.weight_decay = lr, weight_decay
        self.m, self.v = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.t = 0

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        self.weight = (1 - self.lr * self.weight_decay) * self.weight
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        root = self.v.sqrt() / math.sqrt(1 - 0.999**self.t)
        self.weight = self.weight - self.lr * self.m / (1 - 0.9**self.t) / (root + 1e-8)
        if self.weight.numel() >= 4096:
            self.m, self.v = coded(self.m, signed=True), coded(self.v, signed=False)
