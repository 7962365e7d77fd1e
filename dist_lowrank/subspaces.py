"""Column selection: score the columns of a transformed gradient and keep the best.

With `S = A D` (`A` is L x n, `D` an orthonormal dictionary), dropping column k of S loses exactly `||S[:, k]||^2` of
`||A||_F^2`. So the r columns of most energy are the best r columns of the dictionary, and they keep at least `r/n` of
the energy (arXiv 2505.17967, section 4). Scores add up over row shards: ranks sum them, then choose alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANKINGS = ("l2", "l1")

_BLOCK_ELEMENTS = {"cpu": 2**17}  # squared at once; on a CPU what its caches hold
_BLOCK_ELEMENTS_ELSEWHERE = 2**24


def column_scores(coordinates: Tensor, ranking: str = "l2") -> Tensor:
    """Score of each column, additive over row shards.

    Args:
        coordinates: (L, n), float32 or float64; L may be 0.
        ranking: `l2`, sum of squares (the energy), or `l1`, sum of absolute values (the published code's choice,
            without the `1 - r/n` bound).

    Returns:
        Tensor (n,) of the dtype of `coordinates`.
    """
    if ranking not in RANKINGS:
        raise ValueError(f"ranking: {ranking!r} is not allowed; allowed: {', '.join(RANKINGS)}")
    in_one_call = _BLOCK_ELEMENTS.get(coordinates.device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    if not coordinates.is_contiguous() and coordinates.t().is_contiguous():  # of the left side
        parts = torch.split(coordinates, max(1, in_one_call // max(1, len(coordinates))), dim=1)
        return torch.cat([_summed(part, ranking) for part in parts])
    first, *rest = torch.split(coordinates, max(1, in_one_call // coordinates.shape[1]))
    scores = _summed(first, ranking)
    for part in rest:
        scores += _summed(part, ranking)
    return scores


def _summed(coordinates: Tensor, ranking: str) -> Tensor:
    return (coordinates.square() if ranking == "l2" else coordinates.abs()).sum(dim=0)


def top_columns(scores: Tensor, rank: int) -> Tensor:
    """Indices of the `rank` largest scores, ascending; ties go to the lowest index.

    A stable sort rather than `topk`, whose choice among ties differs between devices.

    Returns:
        int64 tensor (rank,).
    """
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:rank].sort().values


def index_dtype(n: int) -> torch.dtype:
    """The narrowest signed integer type that holds n - 1."""
    for dtype in (torch.int8, torch.int16, torch.int32):
        if n - 1 <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64
