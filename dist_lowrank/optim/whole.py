"""Updates that are whole rows: the direction is the update, and nothing is lifted."""

from __future__ import annotations

from torch import Tensor


class WholeRows:
    """Coefficients on all n columns, as they are."""

    def add_lifted(
        self, target: Tensor, coefficients: Tensor, *, decay: float, scale: float, columns: slice = slice(None)
    ) -> None:
        target.mul_(decay).add_(coefficients[:, columns], alpha=scale)
