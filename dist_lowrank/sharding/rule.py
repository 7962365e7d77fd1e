"""The type of an update rule: a generator that yields what it needs from other ranks and is sent the result.

It yields a partial sum and is sent the total, or it yields an `OnOwner` and is sent what one rank made of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor


@dataclass(frozen=True, slots=True)
class OnOwner:
    """Asks that one rank, the matrix's owner in this round, gets all rows and computes something of them.

    Sent back is this rank's part of the result, (l, k). Matrices of one shape whose `compute` is equal are computed
    in one call.
    """

    rows: Tensor  # (l, k), this rank's
    compute: Callable[[Tensor], Tensor]  # from (matrices, L, k) to the same shape


Result = TypeVar("Result")
Rule = Generator[Tensor | OnOwner, Tensor, Result]
