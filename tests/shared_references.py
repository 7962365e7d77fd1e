"""Slow, independent reference of `dictionary="shared"`: float64, all matrices of a model, everything in space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from projected_references import ReferenceFira, ReferenceFrugal, ReferenceProjected, signed
from references import ReferenceDCTAdamW, ReferenceTrion, select
from torch import Tensor


class _Chooses:
    """A method with projections that takes them from the columns of `D`."""

    D: Tensor

    def choose(self: Any, tall: Tensor) -> Tensor:
        return self.D[:, select(tall @ self.D, self.r, "l2")]


class SharedGaLore(_Chooses, ReferenceProjected):
    pass


class SharedFira(_Chooses, ReferenceFira):
    pass


class SharedFrugal(_Chooses, ReferenceFrugal):
    pass


class SharedReference:
    """Matrices whose dictionaries are the eigenvectors of their summed Gram matrices, each divided by its trace.

    Args:
        references: by name; of one of the classes above, `ReferenceDCTAdamW` or `ReferenceTrion`.
        roles: names of the matrices that share a dictionary.
        interval: of changes.
        after_first: at steps 1, T + 1, 2 T + 1, ... instead of 1, T, 2 T, ...
    """

    def __init__(
        self, references: Mapping[str, Any], roles: Sequence[Sequence[str]], interval: int, after_first: bool
    ) -> None:
        self.references, self.roles, self.interval, self.after_first = references, roles, interval, after_first
        self.t = 0

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        self.t += 1
        if self.t == 1 or (self.t - self.after_first) % self.interval == 0:
            for role in self.roles:
                blocks = [self._projected(self.references[name], gradients[name]) for name in role]
                # The right singular vectors of all rows, each matrix scaled to norm 1, one below the other.
                stacked = torch.cat([block / block.norm() for block in blocks])
                dictionary = signed(torch.linalg.svd(stacked)[2].T)
                for name in role:
                    self.references[name].D = dictionary
        for name, reference in self.references.items():
            reference.step(gradients[name])

    def _projected(self, reference: Any, gradient: Tensor) -> Tensor:
        tall = gradient if reference.right else gradient.T
        if isinstance(reference, ReferenceDCTAdamW):
            return tall + reference.tall(reference.error)
        return tall + reference.M if isinstance(reference, ReferenceTrion) else tall
