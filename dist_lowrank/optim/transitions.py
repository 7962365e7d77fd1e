"""What happens to moments when the chosen columns change."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

TRANSITIONS = ("move", "reset", "keep")


def change_columns(transition: str, tensors: Iterable[Tensor], old: Tensor, new: Tensor, n: int) -> None:
    """Carries per-column state from one choice of columns to the next, in place.

    Args:
        transition: `move`: a column keeps its moments wherever it stands, new columns start at zero. Between two
            choices from one orthonormal dictionary this is exactly the product with `D_old^T D_new` (for second
            moments, with its element-wise square), which has at most one 1 per row and column. `reset`: all zero.
            `keep`: slot j keeps its moments whatever column it now holds (as in the published code).
        tensors: state with the columns along the last axis, (..., r).
        old, new: indices (r,), int64, ascending, below n.
    """
    if transition == "keep":
        return
    if transition == "reset":
        for tensor in tensors:
            tensor.zero_()
        return
    slot = torch.full((n,), -1, dtype=torch.int64, device=new.device)
    slot[old] = torch.arange(old.numel(), device=new.device)
    source = slot[new]  # (r,): where a column was, -1 if it was not chosen
    fresh = source < 0
    for tensor in tensors:
        tensor.copy_(tensor.index_select(-1, source.clamp(min=0)).masked_fill_(fresh, 0))


def return_dropped(coordinates: Tensor, momentum: Tensor, old: Tensor, new: Tensor) -> None:
    """Adds the momentum (l, r) of the columns of `old` that `new` lacks to their coordinates (l, n), in place."""
    coordinates.index_add_(1, old, momentum.masked_fill(torch.isin(old, new), 0))
