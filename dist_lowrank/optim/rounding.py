"""Random bits that belong to an element, and rounding with them.

The bits are a hash of (seed, parameter name, step, purpose, position in the global tensor). There is no generator and
no state of one, so they are the same for any world size, sharding and order of work, and a resumed run goes on with
them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHT_ROUNDINGS = ("nearest", "stochastic")
CHUNK_ELEMENTS = 2**20  # worked on at once: bounds the transient memory of hashing
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class RandomBits:
    """The random bits of one parameter at one step."""

    seed: int
    name: str
    step: int

    def at(self, purpose: str, positions: Tensor) -> Tensor:
        """32 random bits for each position (int64, >= 0), as int64 in [0, 2^32)."""
        text = f"{self.seed}\0{self.name}\0{self.step}\0{purpose}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        first, second = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
        bits = _mix((positions & _WORD) ^ first)
        return _mix(bits.bitwise_xor_(((positions >> 32) + second).bitwise_and_(_WORD)))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words under which close words fall far apart; products stay below 2^63."""
    for _ in range(2):
        x = (x >> 16).bitwise_xor_(x).mul_(0x45D9F3B).bitwise_and_(_WORD)
    return (x >> 16).bitwise_xor_(x)


@dataclass(frozen=True, slots=True)
class RowNoise:
    """Random numbers for state that has a row for each row of a matrix, of which this rank holds some."""

    bits: RandomBits
    first_row: int

    def uniform(self, purpose: str, rows: slice, like: Tensor) -> Tensor:
        """Numbers in [0, 1) for `rows` of this rank, of the shape (l, r) and dtype of `like`."""
        first_row = self.first_row + rows.start
        shape = (first_row + like.shape[0], like.shape[1])  # only the number of columns matters
        positions = positions_of(like.shape, (first_row, 0), shape, like.device)
        return (self.bits.at(purpose, positions) >> 8).to(like.dtype).mul_(2.0**-24)


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Cuts rows such that a chunk has about CHUNK_ELEMENTS elements, at least one row."""
    size = max(1, CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def positions_of(block: Sequence[int], offset: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Row-major positions in a tensor of `shape` of the elements of a `block` of it that begins at `offset`, int64."""
    positions = torch.zeros((), dtype=torch.int64, device=device)
    for length, first, size in zip(block, offset, shape, strict=True):
        positions = positions.unsqueeze(-1) * size + torch.arange(first, first + length, device=device)
    return positions


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16, up or down at random such that the mean is exact.

    What bfloat16 represents stays as it is, NaN and infinities too. What is beyond its largest finite number is
    rounded to nearest.

    Args:
        bits: int64 random bits, of which the lowest 16 decide.
    """
    # Neighbours in bfloat16 are 2^16 apart as integers; a carry into the exponent is the next binade, as it should be.
    raised = values.contiguous().view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    rounded = (raised & -0x10000).view(torch.float32)
    ordinary = values.abs() <= torch.finfo(torch.bfloat16).max  # false for NaN
    return torch.where(ordinary, rounded, values).to(torch.bfloat16)


def store_weight(
    weight: Tensor, values: Tensor, rounding: str, random: RandomBits, offset: Sequence[int], shape: Sequence[int]
) -> None:
    """Writes updated values into a local weight, rounding where it is narrower than they.

    Args:
        offset: where the local weight begins in the global one, per dimension; one number for a run of elements.
        shape: of the global weight.
    """
    if rounding == "nearest" or weight.dtype != torch.bfloat16:
        weight.copy_(values)
        return
    if not weight.ndim:
        weight, values, offset = weight.view(1), values.view(1), (0,)
    shape = shape or (1,)  # also of a run of elements of a number
    for rows in row_chunks(weight.shape[0], weight[:1].numel()):
        chunk = values[rows].float()
        begin, known = (offset[0] + rows.start, *offset[1:]), shape[: chunk.ndim]  # only the last dimensions matter
        positions = positions_of(chunk.shape, begin, known, chunk.device)
        weight[rows].copy_(round_stochastically(chunk, random.at("weight", positions)))
