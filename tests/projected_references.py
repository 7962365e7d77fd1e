"""Slow, independent references of the optimizers with projections: plain float64, one matrix, from the formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from references import dense_dictionary, rank_of, select
from torch import Tensor


def leading_vectors(tall: Tensor, rank: int) -> Tensor:
    """(n, r): right singular vectors, largest first, the largest-magnitude entry of each positive."""
    vectors = torch.linalg.svd(tall, full_matrices=False)[2][:rank].T
    if vectors.shape[1] < rank:  # fewer rows than directions: any completion; the tests avoid it
        raise AssertionError
    return signed(vectors)


def signed(vectors: Tensor) -> Tensor:
    signs = [1.0 if column[column.abs().argmax()] >= 0 else -1.0 for column in vectors.T]
    return vectors * torch.tensor(signs, dtype=vectors.dtype)


class ReferenceProjected:
    """What the family shares: the tall form, Adam on R = A P, and the basis P at steps 1, T + 1, 2 T + 1, ...

    Args:
        basis: `svd`, the name of a dictionary, or a function of the number of the choice that gives P.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        rank: float,
        refresh_interval: int,
        basis: str | Callable[[int], Tensor] = "svd",
        alpha: float = 1.0,
        weight_decay: float = 0.0,
        transition: str = "keep",
        corrected_eps: bool = True,
        decay_last: bool = False,
        square_left: bool = False,
        offset: int = 0,
        **own: Any,
    ) -> None:
        self.weight = weight.detach().double().clone()
        rows, columns = weight.shape
        self.right = rows > columns if square_left else rows >= columns
        length, n = (rows, columns) if self.right else (columns, rows)
        self.r = rank_of(rank, n)
        self.m, self.v = (torch.zeros(length, self.r, dtype=torch.float64) for _ in range(2))
        self.P = torch.zeros(n, self.r, dtype=torch.float64)
        self.t = self.since = 0
        self.norm = 0.0
        self.__dict__ |= {"lr": lr, "betas": betas, "eps": eps, "T": refresh_interval, "basis": basis, "alpha": alpha}
        self.__dict__ |= {"weight_decay": weight_decay, "transition": transition, "corrected_eps": corrected_eps}
        self.__dict__ |= {"decay_last": decay_last, "offset": offset, **own}

    def choose(self, tall: Tensor) -> Tensor:
        if callable(self.basis):
            return self.basis((self.t - 1) // self.T)
        if self.basis == "svd":
            return leading_vectors(tall, self.r)
        dictionary = dense_dictionary(self.basis, tall.shape[1])
        return dictionary[:, select(tall @ dictionary, self.r, "l2")]

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        tall = gradient.double() if self.right else gradient.double().T
        if self.t == 1 or (self.t - 1 - self.offset) % self.T == 0:
            old, self.P = self.P, self.choose(tall)
            self.carry(old.T @ self.P)
        self.since += 1
        R = tall @ self.P
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * R
        self.v = b2 * self.v + (1 - b2) * R**2
        count = self.since if self.transition == "reset" else self.t
        if self.corrected_eps:
            c, psi = 1.0, (self.m / (1 - b1**count)) / ((self.v / (1 - b2**count)).sqrt() + self.eps)
        else:
            c, psi = (1 - b2**count) ** 0.5 / (1 - b1**count), self.m / (self.v.sqrt() + self.eps)
        update = c * self.update(tall, R, psi)
        update = update if self.right else update.T
        decay = 1 - self.lr * self.weight_decay
        if self.decay_last:
            self.weight = decay * (self.weight - self.lr * update)
        else:
            self.weight = decay * self.weight - self.lr * update

    def carry(self, rotation: Tensor) -> None:
        if self.transition == "move":
            self.m, self.v = self.m @ rotation, self.v @ rotation**2
        elif self.transition == "reset":
            self.m, self.v, self.since = torch.zeros_like(self.m), torch.zeros_like(self.v), 0

    def update(self, tall: Tensor, R: Tensor, psi: Tensor) -> Tensor:
        return self.alpha * psi @ self.P.T

    def limit_growth(self, S: Tensor) -> Tensor:
        norm = float(S.norm())
        if self.norm > 0:
            S = S / (max(norm / (self.norm + 1e-8), 1.01) / 1.01)
        self.norm = float(S.norm())
        return S


class ReferenceFira(ReferenceProjected):
    """arXiv 2410.01623; `inside` is what the published code leaves in the residual of the projection."""

    def update(self, tall: Tensor, R: Tensor, psi: Tensor) -> Tensor:
        phi = psi.norm(dim=1) / (R.norm(dim=1) + 1e-8)
        S = (tall - (1 - self.inside) * R @ self.P.T) * phi[:, None]
        return self.alpha * psi @ self.P.T + self.limit_growth(S)


class ReferenceFrugal(ReferenceProjected):
    """arXiv 2411.07837."""

    def update(self, tall: Tensor, R: Tensor, psi: Tensor) -> Tensor:
        return psi @ self.P.T + self.kappa * torch.sign(tall - R @ self.P.T)


class ReferenceBlocks(ReferenceProjected):
    """arXiv 2411.07837 with whole matrices: `turns` says of each interval whether it is this matrix's."""

    def step(self, gradient: Tensor) -> None:
        G, (b1, b2), age = gradient.double(), self.betas, self.t % self.T + 1
        if age == 1:
            self.m, self.v = torch.zeros_like(G), torch.zeros_like(G)
        self.weight = (1 - self.lr * self.weight_decay) * self.weight
        if self.turns[self.t // self.T]:
            self.m, self.v = b1 * self.m + (1 - b1) * G, b2 * self.v + (1 - b2) * G**2
            self.weight -= self.lr * (self.m / (1 - b1**age)) / ((self.v / (1 - b2**age)).sqrt() + self.eps)
        else:
            self.weight -= self.lr * self.kappa * torch.sign(G)
        self.t += 1


class ReferenceApollo(ReferenceProjected):
    """arXiv 2412.05270."""

    def update(self, tall: Tensor, R: Tensor, psi: Tensor) -> Tensor:
        if self.per == "tensor":
            s = psi.norm() / (R.norm() + 1e-8)
        else:
            s = (psi.norm(dim=1) / (R.norm(dim=1) + 1e-8))[:, None]
        return self.limit_growth(s * tall) * self.scale**0.5


class ReferenceLDAdam(ReferenceProjected):
    """arXiv 2410.16103, with everything in space."""

    def step(self, gradient: Tensor) -> None:
        tall = gradient.double() if self.right else gradient.double().T
        self.error = getattr(self, "error", torch.zeros_like(tall))
        G = tall + self.error
        b1, b2 = self.betas
        k = self.t
        if k == 0:
            self.P, rotated, returned = leading_vectors(G, self.r), self.m, torch.zeros_like(G)
        else:
            old = self.P
            B = self.rho * self.m @ old.T / (1 - b1**k) + (1 - self.rho) * G
            self.P = signed(torch.linalg.qr(B.T @ (B @ old))[0])
            C = old.T @ self.P
            rotated = self.m @ C
            returned = b1 / (1 - b1) * (self.m @ old.T - rotated @ self.P.T)
            c1, c2 = 1 - b1**k, 1 - b2**k
            self.v = c2 * ((self.v / c2 - self.m**2 / c1**2) @ C**2 + rotated**2 / c1**2).abs()
        R = G @ self.P
        self.error = G - R @ self.P.T + returned if self.feedback else torch.zeros_like(G)
        self.t += 1
        self.m = b1 * rotated + (1 - b1) * R
        self.v = b2 * self.v + (1 - b2) * R**2
        psi = (self.m / (1 - b1**self.t)) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)
        update = psi @ self.P.T
        self.weight = (1 - self.lr * self.weight_decay) * self.weight - self.lr * (update if self.right else update.T)


class ReferenceSubTrack(ReferenceFira):
    """arXiv 2502.01586, in the notation of the paper: S (n x r), G (n x l)."""

    def choose(self, tall: Tensor) -> Tensor:
        if self.t == 1:
            return super().choose(tall)
        S, G = self.P, tall.T
        A = torch.linalg.lstsq(S, G).solution
        D = -2 * (G - S @ A) @ A.T
        U, sigma, Vh = torch.linalg.svd(D)
        u, v, angle = U[:, :1], Vh[:1].T, sigma[0] * self.eta
        turned = (S @ v) * torch.cos(angle) - u * torch.sin(angle)
        return turned @ v.T + S @ (torch.eye(self.r, dtype=S.dtype) - v @ v.T)

    def carry(self, rotation: Tensor) -> None:
        k = self.t - 1
        if k == 0:
            return
        b1, b2 = self.betas
        mean, square, moved = self.m / (1 - b1**k), self.v / (1 - b2**k), self.m @ rotation
        variance = (square - mean**2) @ rotation**2
        self.v = (1 - b2**k) * (variance + (moved / (1 - b1**k)) ** 2).abs()
        self.m = moved


class ReferenceGrass(ReferenceProjected):
    """arXiv 2406.17660 with top-r: every selected row has an Adam of its own, which starts when it is selected."""

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        rows, weight = (each.double().T if self.right else each.double() for each in (gradient, self.weight))
        if self.t == 1:
            self.adams: dict[int, tuple[Tensor, Tensor, int]] = {}
        if (self.t - 1) % self.T == 0:
            chosen = sorted(range(len(rows)), key=lambda i: -float(rows[i].norm()))[: self.r]
            fresh = (torch.zeros_like(rows[0]), torch.zeros_like(rows[0]), 0)
            kept = self.adams if self.transition == "move" else {}
            self.adams = {i: kept.get(i, fresh) for i in chosen}
        weight = (1 - self.lr * self.weight_decay) * weight
        b1, b2 = self.betas
        for i, (m, v, age) in self.adams.items():
            m, v, age = b1 * m + (1 - b1) * rows[i], b2 * v + (1 - b2) * rows[i] ** 2, age + 1
            self.adams[i] = m, v, age
            weight[i] -= self.lr * self.alpha * (m / (1 - b1**age)) / ((v / (1 - b2**age)).sqrt() + self.eps)
        self.weight = weight.T if self.right else weight
