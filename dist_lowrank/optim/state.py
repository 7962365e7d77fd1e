"""How the parts of a recipe declare the state that they keep for a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of state.

    `sharded` tensors have a row for each row of the tall form and `columns` columns; they are cut like the matrix.
    Others are the same on all ranks: vectors of `columns` entries, or matrices of `rows` such rows.
    """

    columns: int
    dtype: torch.dtype
    cause: str  # its line in the memory ledger: moments, indices, projection, error_feedback
    sharded: bool = True
    rows: int | None = None  # of a matrix that is not sharded
    dormant: bool = False  # takes no memory until its rule wakes it
