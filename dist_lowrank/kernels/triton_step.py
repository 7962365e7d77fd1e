"""A step on dictionary columns in three Triton kernels. Needs `triton`; taken with `kernels="triton"`.

- `column_energy`: what columns are chosen by, without the transformed gradient ever in memory;
- `project_and_direct`: projection, Adam's moments and direction, from gradient to direction in one;
- `lift_into`: lift, decay and weight update, from direction to weight in one.

Gradients and weights of any strides, and moments, all of float32 or bfloat16, are read and written as they are, without
a copy in float32; chosen columns are read from the dictionary by their indices. Products have operands of the
dictionary's dtype; sums, scores and Adam are float32. Nothing is added atomically, so that a step repeats to the bit.

Each has a path in torch that says what it computes: `column_scores(dictionary.transform(rows))`, `dictionary.project`
and `adam_direction`, `dictionary.add_lifted`. The kernels were run in Triton's interpreter alone, on a CPU; whether
they are faster than the path in torch is unmeasured, and that one is the default until it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _INNER = 64, 64, 32  # of a tile


@triton.jit
def _projected(
    rows, atoms, row, known_row, column, known_column, n: tl.constexpr, row_stride, entry_stride, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of `rows @ D`, (ROWS, COLUMNS): of these rows and columns; zero where they are not known."""
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, n, INNER):
        entry = start + tl.arange(0, INNER).to(tl.int64)
        inside = entry < n
        left = tl.load(
            rows + row[:, None] * row_stride + entry[None, :] * entry_stride,
            mask=known_row[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            atoms + column[None, :] * n + entry[:, None], mask=known_column[None, :] & inside[:, None], other=0.0
        )
        sums = tl.dot(left.to(right.dtype), right, sums, input_precision="ieee")
    return sums


@triton.jit
def _column_energy(
    rows, atoms, partials, length, n: tl.constexpr, row_stride, entry_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    sums = _projected(
        rows, atoms, row, row < length, column, column < n, n, row_stride, entry_stride, ROWS, COLUMNS, INNER
    )  # fmt: skip
    tl.store(partials + tl.program_id(0) * n + column, tl.sum(sums * sums, axis=0), mask=column < n)


@triton.jit
def _project_and_direct(
    rows, atoms, indices, mean, square, direction, length, n: tl.constexpr, rank: tl.constexpr, row_stride,
    entry_stride,
    new1, new2, correction1, correction2, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    slot = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column = tl.load(indices + slot, mask=slot < rank, other=0)
    sums = _projected(
        rows, atoms, row, row < length, column, slot < rank, n, row_stride, entry_stride, ROWS, COLUMNS, INNER
    )  # fmt: skip
    place = row[:, None] * rank + slot[None, :]
    known = (row < length)[:, None] & (slot < rank)[None, :]
    first = tl.load(mean + place, mask=known, other=0.0).to(tl.float32)
    second = tl.load(square + place, mask=known, other=0.0).to(tl.float32)
    first += new1 * (sums - first)
    second += new2 * (sums * sums - second)
    tl.store(mean + place, first.to(mean.dtype.element_ty), mask=known)
    tl.store(square + place, second.to(square.dtype.element_ty), mask=known)
    updated = first / correction1 / (tl.sqrt(second / correction2) + eps)
    tl.store(direction + place, updated.to(direction.dtype.element_ty), mask=known)


@triton.jit
def _lift_into(
    weight, direction, atoms, indices, length, n: tl.constexpr, rank: tl.constexpr, row_stride, entry_stride, decay,
    scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    entry = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rank, INNER):
        slot = start + tl.arange(0, INNER)
        inside = slot < rank
        column = tl.load(indices + slot, mask=inside, other=0)
        left = tl.load(
            direction + row[:, None] * rank + slot[None, :], mask=(row < length)[:, None] & inside[None, :], other=0.0
        )
        right = tl.load(
            atoms + column[:, None] * n + entry[None, :], mask=inside[:, None] & (entry < n)[None, :], other=0.0
        )
        sums = tl.dot(left.to(right.dtype), right, sums, input_precision="ieee")
    place = weight + row[:, None] * row_stride + entry[None, :] * entry_stride
    known = (row < length)[:, None] & (entry < n)[None, :]
    updated = decay * tl.load(place, mask=known, other=0.0).to(tl.float32) + scale * sums
    tl.store(place, updated.to(weight.dtype.element_ty), mask=known)


def column_energy(rows: Tensor, atoms: Tensor) -> Tensor:
    """The sum of squares of each column of `rows @ D`.

    Args:
        rows: (L, n), float32 or bfloat16, any strides.
        atoms: `D^T`, (n, n), contiguous, float32 or bfloat16.

    Returns:
        Tensor (n,), float32.
    """
    _check(atoms, rows)
    length, n = rows.shape
    partials = torch.empty(triton.cdiv(length, _ROWS), n, dtype=torch.float32, device=rows.device)
    grid = (len(partials), triton.cdiv(n, _COLUMNS))
    if length:
        _column_energy[grid](rows, atoms, partials, length, n, *rows.stride(), _ROWS, _COLUMNS, _INNER)
    return partials.sum(dim=0)


def project_and_direct(
    rows: Tensor,
    atoms: Tensor,
    indices: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """`adam_direction` of the coefficients `rows @ D[:, indices]`; the moments move in place.

    Args:
        rows, atoms: as `column_energy`'s.
        indices: (r,), int64.
        mean, square: (L, r), float32 or bfloat16, contiguous.

    Returns:
        Tensor (L, r), of the dictionary's dtype.
    """
    (length, n), rank = rows.shape, len(indices)
    _check(atoms, rows, mean, square)
    direction = torch.empty_like(mean, dtype=atoms.dtype)
    grid = (triton.cdiv(length, _ROWS), triton.cdiv(rank, _COLUMNS))
    corrections = (1 - betas[0] ** step, 1 - betas[1] ** step)
    if length:
        _project_and_direct[grid](
            rows, atoms, indices, mean, square, direction, length, n, rank, *rows.stride(),
            1 - betas[0], 1 - betas[1], *corrections, eps, _ROWS, _COLUMNS, _INNER,
        )  # fmt: skip
    return direction


def lift_into(weight: Tensor, direction: Tensor, atoms: Tensor, indices: Tensor, *, decay: float, scale: float) -> None:
    """In place: `weight = decay * weight + scale * direction @ D[:, indices]^T`, rounded to nearest once.

    Args:
        weight: (L, n), float32 or bfloat16, any strides.
        direction: (L, r), float32 or bfloat16, contiguous.
        atoms, indices: as `project_and_direct`'s.
    """
    (length, n), rank = weight.shape, len(indices)
    _check(atoms, weight, direction)
    grid = (triton.cdiv(length, _ROWS), triton.cdiv(n, _COLUMNS))
    if length:
        _lift_into[grid](
            weight, direction, atoms, indices, length, n, rank, *weight.stride(), decay, scale,
            _ROWS, _COLUMNS, _INNER,
        )  # fmt: skip


def _check(atoms: Tensor, matrix: Tensor, *contiguous: Tensor) -> None:
    for each in (atoms, matrix, *contiguous):
        if each.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype: {each.dtype} is not allowed; allowed: torch.float32, torch.bfloat16")
    for each in (atoms, *contiguous):
        if not each.is_contiguous():
            raise ValueError(f"strides: {each.stride()} of shape {tuple(each.shape)}; allowed: contiguous")
