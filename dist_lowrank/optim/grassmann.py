"""The subspace of SubTrack++: it follows the gradient by steps on the Grassmannian, one direction at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_lowrank.optim.options import check_number
from dist_lowrank.optim.projections import Projection, StoredProjection, Svd, orthonormal
from dist_lowrank.optim.subspace import Choice, Place, Statistics
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule


@dataclass(frozen=True, slots=True)
class Grassmann(StoredProjection):
    """The basis before, turned towards what it misses of the gradient (SubTrack++, arXiv 2502.01586, section 3).

    The squared distance of `A` from the subspace, `|A - a P^T|^2` with the least-squares `a = A P`, has the tangent
    `D = -2 (A - a P^T)^T a`, n x r. With its leading singular triple, `D ~ sigma u v^T`, and `step` eta:

        P <- (P v cos(sigma eta) - u sin(sigma eta)) v^T + P (I - v v^T)

    The first basis is the SVD's. `D = -2 (I - P P^T) A^T (A P)`, so one n x r sum over the rows is all it takes. QR
    takes away what rounding adds to the lengths; with a positive diagonal it turns nothing.
    """

    step: float = 10.0

    def __post_init__(self) -> None:
        check_number("grassmann_step", self.step)

    def statistics(self, form: TallForm, first: bool = False) -> Statistics:
        return Svd().statistics(form) if first else [form.n * form.rank]

    def scratch_elements(self, form: TallForm) -> int:
        return max(Svd().scratch_elements(form), 20 * form.n * form.rank)  # the first time; later, in float64

    def choose(
        self, coordinates: Tensor, state: Mapping[str, Tensor], place: Place, number: int, mean: Tensor | None
    ) -> Rule[Choice]:
        if number == 0:
            return (yield from Svd().choose(coordinates, state, place, number, mean))
        rows = coordinates[place.owned]
        product = yield rows.t() @ (rows @ state["projection"])  # (n, r)
        vectors, product = state["projection"].double(), product.double()
        tangent = torch.addmm(product, vectors, vectors.t() @ product, alpha=-1).mul_(-2)  # D, (n, r)
        v = torch.linalg.eigh(tangent.t() @ tangent)[1][:, -1:]  # (r, 1), of the largest singular value
        u = tangent @ v  # (n, 1), times sigma
        sigma = u.norm()
        u = u / sigma.clamp(min=torch.finfo(u.dtype).tiny)  # without a tangent nothing turns
        angle = sigma * self.step
        turned = (vectors @ v) * (angle.cos() - 1) - u * angle.sin()
        return Choice(Projection(orthonormal(torch.addmm(vectors, turned, v.t())).to(place.dtype)))
