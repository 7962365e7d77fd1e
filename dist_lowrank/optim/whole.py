"""Updates that are whole rows: the direction is the update, and nothing is lifted.

Where the update is the gradient times a number per row and a number per column, its rows need not travel: replicas
have the gradient, the numbers of columns are the same on all ranks, and those of rows are delivered (see
`Recipe.full_rows`).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_lowrank.sharding.layouts import TallForm


class WholeRows:
    """Coefficients on all n columns, as they are."""

    def add_lifted(
        self, target: Tensor, coefficients: Tensor, *, decay: float, scale: float, columns: slice = slice(None)
    ) -> None:
        target.mul_(decay).add_(coefficients[:, columns], alpha=scale)


@dataclass(frozen=True, slots=True)
class ColumnFactors(WholeRows):
    """Of updates that are rows of the gradient, weighted, times a factor per column, (n,)."""

    factors: Tensor

    def of(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Rows (l, n) times their weights (l, 1) and these factors."""
        return (rows * weights).mul_(self.factors)


def follow_squares(
    squares: Tensor, rows: Tensor, columns: Tensor, beta: float, form: TallForm, owned: slice
) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A running mean of squares as an outer product of means over rows and over columns (arXiv 1804.04235).

    Yields one sum, of n + 1 elements.

    Args:
        squares: (l, n), positive.
        rows, columns: (l, 1) and (n,), the state; moved in place to `beta` of themselves and the rest of the new means.

    Returns:
        `1 / sqrt(rows / mean(rows))`, (l, 1), and `1 / sqrt(columns)`, (n,), whose product is one over the root.
    """
    rows.lerp_(squares.mean(dim=1, keepdim=True), 1 - beta)
    partial = torch.cat([squares[owned].sum(dim=0), rows[owned].sum().view(1)])
    del squares  # of every matrix of a wave at once, otherwise
    total = yield partial
    columns.lerp_(total[:-1] / form.rows, 1 - beta)
    return (rows * (form.rows / total[-1])).rsqrt_(), columns.rsqrt()
