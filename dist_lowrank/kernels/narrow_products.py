"""Matrix products whose operands are of a narrower dtype than their sums: bfloat16, summed in float32.

On a GPU that is what its matrix units do, and torch offers it for results in float32. A CPU's library rounds the result
too, so there blocks of the operands are widened, which is exact, and multiplied as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**20  # of an operand that are widened at once

_WIDE_SUMS = ("cuda", "meta")  # device types whose products sum bfloat16 in float32


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left @ right` in `dtype`, of operands (l, k) and (k, m) of a narrower one, without rounding in between."""
    if left.device.type in _WIDE_SUMS and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    result = torch.empty(len(left), right.shape[1], dtype=dtype, device=left.device)
    add_product(result, left, right, beta=0, alpha=1)
    return result


def add_product(target: Tensor, left: Tensor, right: Tensor, *, beta: float, alpha: float) -> None:
    """In place: `target = beta * target + alpha * left @ right`, rounded once if target is of the operands' dtype.

    Args:
        target: (l, m), of any strides; of the operands' dtype or a wider one.
        left, right: (l, k) and (k, m), bfloat16.
    """
    if target.device.type in _WIDE_SUMS and target.dtype == torch.float32:
        torch.addmm(target, left, right, out_dtype=torch.float32, beta=beta, alpha=alpha, out=target)
        return
    if target.device.type in _WIDE_SUMS and target.dtype == left.dtype:
        _add_rounded(target, left, right, beta, alpha)
        return
    wide = torch.promote_types(target.dtype, torch.float32)
    for columns in _blocks(right.shape[1], len(right)):
        factor = right[:, columns].to(wide)
        for rows in _blocks(len(left), max(left.shape[1], factor.shape[1])):
            part = target[rows, columns]
            total = part.to(wide)
            total.addmm_(left[rows].to(wide), factor, beta=beta, alpha=alpha)
            if total is not part:
                part.copy_(total)


def _add_rounded(target: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> None:
    """Into bfloat16, on a GPU: its library may not add partial sums in bfloat16, as torch allows it by default."""
    allowed = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        target.addmm_(left, right, beta=beta, alpha=alpha)
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed


def _blocks(count: int, elements: int) -> Iterator[slice]:
    """Of so many lines of `elements` each."""
    size = max(1, BLOCK_ELEMENTS // max(1, elements))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
