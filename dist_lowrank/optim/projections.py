"""Subspaces spanned by an n x r matrix with orthonormal columns (or random ones), equal on all ranks.

How one is chosen without gathering a gradient: by a statistic that adds up over rows.

- `Svd`: the right singular vectors of the tall form are eigenvectors of its Gram matrix, `A^T A`, n x n.
- `RandomizedSvd`: a range finder, `A^T (A V)`, n x k in each round, then a k x k Gram matrix.
- `RandomProjection`: nothing; random numbers that belong to seed, parameter name and number of the choice.
- `PowerIteration`: one product `B^T (B P)`, n x r, from the basis before (as `Grassmann`, in a file of its own).

Vectors come in descending order with their largest-magnitude entry positive (the first of equals), so that moments
that are kept mean the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dist_lowrank.kernels import products
from dist_lowrank.optim.options import check_choice, check_count, check_number
from dist_lowrank.optim.rounding import RandomBits, positions_of
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.subspace import Choice, Place, Possible, Statistics
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule

OVERSAMPLING = 8  # columns beyond r in the randomized range finder (Halko, Martinsson and Tropp, arXiv 0909.4061)
_DRAWN_ELEMENTS = 16  # per normal number: two hashes of 64-bit positions, float64


@dataclass(frozen=True, slots=True)
class Projection:
    """Spanned by the columns of `vectors`, (n, r)."""

    vectors: Tensor

    def take(self, coordinates: Tensor) -> Tensor:
        return self.project(coordinates)

    def project(self, rows: Tensor) -> Tensor:
        return products.product(rows, self.vectors).contiguous()

    def replace(self, coordinates: Tensor, coefficients: Tensor, keep: float) -> None:
        products.add_product(coordinates, coefficients, self.vectors.t(), beta=1, alpha=keep - 1)

    def add_lifted(
        self, target: Tensor, coefficients: Tensor, *, decay: float, scale: float, columns: slice = slice(None)
    ) -> None:
        products.add_product(target, coefficients, self.vectors[columns].t(), beta=decay, alpha=scale)

    def change_from(self, previous: Projection) -> Rotation:
        return Rotation(previous.vectors, self.vectors)


@dataclass(frozen=True, slots=True)
class DrawnProjection(Projection):
    """Drawn at random, and which draw it is."""

    number: int


@dataclass(frozen=True, slots=True)
class Rotation:
    """From one n x r basis to another."""

    old: Tensor
    new: Tensor

    def carry(self, transition: str, first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
        if transition == "keep":
            return
        if transition == "reset":
            for tensor in (*first, *second):
                tensor.zero_()
            return
        product = self.old.t() @ self.new  # (r, r)
        for tensor in first:
            tensor.copy_(tensor @ product)
        for tensor in second:
            tensor.copy_(tensor @ product.square())

    def return_dropped(self, coordinates: Tensor, momentum: Tensor) -> None:
        coordinates.addmm_(momentum, self.old.t())
        coordinates.addmm_(momentum @ (self.old.t() @ self.new), self.new.t(), alpha=-1)


@dataclass(frozen=True, slots=True)
class StoredProjection:
    """What projections that are kept in the state have in common; subclasses say how they are chosen."""

    uses_momentum: ClassVar[bool] = False

    def check(self, form: TallForm) -> None:
        pass

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        return {"projection": StateTensor(form.rank, dtype, "projection", sharded=False, rows=form.n)}

    def coordinates(self, rows: Tensor, place: Place) -> Tensor:
        return rows

    def stored(self, state: Mapping[str, Tensor], place: Place) -> Projection:
        return Projection(state["projection"].to(place.dtype))

    def store(self, basis: Projection, state: Mapping[str, Tensor]) -> None:
        state["projection"].copy_(basis.vectors)


@dataclass(frozen=True, slots=True)
class Svd(StoredProjection):
    """The r right singular vectors of the tall form with the largest singular values.

    From the Gram matrix, summed in the dtype of the rows and decomposed in float64. Its eigenvalues are squares of
    singular values, so what lies below `sqrt(eps)` of the largest singular value is rounding: where the r-th does, a
    randomized range finder takes over.
    """

    def statistics(self, form: TallForm, first: bool = False) -> Statistics:
        if form.rank == 1:  # which only a gradient of zero is below, and that has no other directions
            return [form.n**2]
        return [form.n**2, *map(Possible, RandomizedSvd().statistics(form))]

    def scratch_elements(self, form: TallForm) -> int:
        return 14 * form.n**2  # matrix, vectors, their copies and LAPACK's workspace, in float64

    def choose(
        self, coordinates: Tensor, state: Mapping[str, Tensor], place: Place, number: int, mean: Tensor | None
    ) -> Rule[Choice]:
        rows = coordinates[place.owned]
        gram = yield rows.t() @ rows  # (n, n)
        values, vectors = torch.linalg.eigh(gram.double())  # ascending
        values, vectors = values.flip(0), vectors.flip(1)[:, : place.form.rank]
        rounding = torch.finfo(place.dtype).eps * place.form.n
        if values[0] > 0 and values[place.form.rank - 1] <= rounding * values[0]:
            return (yield from RandomizedSvd().choose(coordinates, state, place, number, mean))
        return _chosen(vectors, place, values[: place.form.rank].sum() / values.sum())


@dataclass(frozen=True, slots=True)
class RandomizedSvd(StoredProjection):
    """The same by a randomized range finder with power iterations (arXiv 0909.4061, algorithm 4.4)."""

    power_iterations: int = 2

    def __post_init__(self) -> None:
        check_count("power_iterations", self.power_iterations)

    def statistics(self, form: TallForm, first: bool = False) -> list[int]:
        width = min(form.n, form.rank + OVERSAMPLING)
        return [form.n * width] * self.power_iterations + [width**2 + 1]

    def scratch_elements(self, form: TallForm) -> int:
        return _DRAWN_ELEMENTS * form.n * min(form.n, form.rank + OVERSAMPLING)

    def choose(
        self, coordinates: Tensor, state: Mapping[str, Tensor], place: Place, number: int, mean: Tensor | None
    ) -> Rule[Choice]:
        rows = coordinates[place.owned]
        width = min(place.form.n, place.form.rank + OVERSAMPLING)
        basis = torch.linalg.qr(gaussian(place, "range", number, width))[0]
        for _ in range(self.power_iterations):
            product = yield rows.t() @ (rows @ basis)  # (n, width)
            basis = torch.linalg.qr(product)[0]
        inside = rows @ basis
        gram, energy = inside.t() @ inside, rows.square().sum().view(1)
        total = yield torch.cat([gram.flatten(), energy])
        values, rotation = torch.linalg.eigh(total[:-1].view(width, width).double())
        vectors = basis.double() @ rotation.flip(1)[:, : place.form.rank]
        return _chosen(vectors, place, values.flip(0)[: place.form.rank].sum() / total[-1])


@dataclass(frozen=True, slots=True)
class PowerIteration(StoredProjection):
    """One block power iteration from the basis before, on a mean of momentum and gradient (LDAdam, arXiv 2410.16103).

    `B = rho m P^T + (1 - rho) A`, `P <- qr(B^T (B P))`; the first basis is the SVD's.
    """

    rho: float = 0.908

    uses_momentum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("rho", self.rho)

    def statistics(self, form: TallForm, first: bool = False) -> Statistics:
        return Svd().statistics(form) if first else [form.n * form.rank]

    def scratch_elements(self, form: TallForm) -> int:
        return Svd().scratch_elements(form)  # the first time

    def choose(
        self, coordinates: Tensor, state: Mapping[str, Tensor], place: Place, number: int, mean: Tensor | None
    ) -> Rule[Choice]:
        if number == 0:
            return (yield from Svd().choose(coordinates, state, place, number, mean))
        assert mean is not None
        vectors = state["projection"].to(place.dtype)
        rows = torch.addmm(coordinates, mean, vectors.t(), beta=1 - self.rho, alpha=self.rho)[place.owned]
        product = yield rows.t() @ (rows @ vectors)
        # No order is lost: QR keeps the span of each leading block. Its signs are fixed, so that bases are continuous.
        return _chosen(torch.linalg.qr(product.double())[0], place, None)


@dataclass(frozen=True, slots=True)
class RandomProjection:
    """Random directions, drawn anew at each choice; nothing is stored, since they can be drawn again.

    `gaussian`: independent entries of variance 1/r (APOLLO, arXiv 2412.05270). `orthonormal`: uniform on the Stiefel
    manifold (GoLore, arXiv 2410.11289). `coordinates`: r of the n axes (FRUGAL's columns, arXiv 2411.07837).
    """

    kind: str = "gaussian"

    uses_momentum: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("gaussian", "orthonormal", "coordinates"))

    def check(self, form: TallForm) -> None:
        pass

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        return {"draw": StateTensor(1, torch.int64, "other_state", sharded=False)}

    def statistics(self, form: TallForm, first: bool = False) -> list[int]:
        return []

    def scratch_elements(self, form: TallForm) -> int:
        return _DRAWN_ELEMENTS * form.n * form.rank

    def coordinates(self, rows: Tensor, place: Place) -> Tensor:
        return rows

    def stored(self, state: Mapping[str, Tensor], place: Place) -> Projection:
        number = int(state["draw"])
        return DrawnProjection(self._draw(place, number), number)

    def choose(
        self, coordinates: Tensor, state: Mapping[str, Tensor], place: Place, number: int, mean: Tensor | None
    ) -> Rule[Choice]:
        yield from ()  # needs no sums
        return Choice(DrawnProjection(self._draw(place, number), number))

    def store(self, basis: DrawnProjection, state: Mapping[str, Tensor]) -> None:
        state["draw"].fill_(basis.number)

    def _draw(self, place: Place, number: int) -> Tensor:
        n, rank = place.form.n, place.form.rank
        if self.kind == "coordinates":
            order = _bits(place, "axes", number).at("", torch.arange(n, device=place.device)).argsort(stable=True)
            return torch.eye(n, dtype=place.dtype, device=place.device)[:, order[:rank].sort().values]
        drawn = gaussian(place, "projection", number, rank)
        if self.kind == "gaussian":
            return drawn / math.sqrt(rank)
        return orthonormal(drawn).to(place.dtype)


@dataclass(frozen=True, slots=True)
class SvdThenRandom(StoredProjection):
    """The SVD's subspace, and from a step on random ones (GoLore, arXiv 2410.11289)."""

    switch_step: int

    def __post_init__(self) -> None:
        check_count("switch_step", self.switch_step)

    def statistics(self, form: TallForm, first: bool = False) -> Statistics:
        return Svd().statistics(form)

    def scratch_elements(self, form: TallForm) -> int:
        return Svd().scratch_elements(form)

    def choose(
        self, coordinates: Tensor, state: Mapping[str, Tensor], place: Place, number: int, mean: Tensor | None
    ) -> Rule[Choice]:
        if place.random.step < self.switch_step:
            return (yield from Svd().choose(coordinates, state, place, number, mean))
        return _chosen(orthonormal(gaussian(place, "projection", number, place.form.rank)), place, None)


def orthonormal(vectors: Tensor) -> Tensor:
    """The QR factor of (n, r) whose diagonal is positive, which is unique; float64.

    Of independent normal numbers it is uniform on the Stiefel manifold; of an orthonormal matrix it is the matrix.
    """
    q, r = torch.linalg.qr(vectors.double())
    return torch.mul(q, torch.where(r.diagonal() < 0, -1.0, 1.0))


def gaussian(place: Place, purpose: str, number: int, columns: int) -> Tensor:
    """Standard normal numbers (n, columns) of a matrix and a choice, by Box and Muller's transform of its bits."""
    bits = _bits(place, purpose, number)
    shape = (place.form.n, columns)
    positions = positions_of(shape, (0, 0), shape, place.device)
    radius, angle = (bits.at(part, positions).double() for part in ("radius", "angle"))
    uniform = (radius + 0.5) * 2.0**-32  # in (0, 1)
    return ((-2 * uniform.log()).sqrt() * (angle * (2 * math.pi * 2.0**-32)).cos()).to(place.dtype)


def _bits(place: Place, purpose: str, number: int) -> RandomBits:
    return replace(place.random, name=f"{place.random.name}\0{purpose}", step=number)


def _chosen(vectors: Tensor, place: Place, captured: Tensor | None) -> Choice:
    return Choice(Projection(with_fixed_signs(vectors).to(place.dtype)), captured)


def with_fixed_signs(vectors: Tensor) -> Tensor:
    """Columns (n, r) whose entry of largest magnitude is positive, the first of equals."""
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return vectors * torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0)
