"""Rows of numbers as codes of four or eight bits, and back: pure functions over tensors.

Three codes, for three purposes. None looks beyond one row, so blocks of rows give what all rows together give, and
sharding the rows changes nothing.

- *Levels*: evenly spaced between the least and the largest number of a row; rounds to nearest. For the error
  accumulator, whose numbers of one row are of one size.
- *Geometric*: evenly spaced logarithms below the largest magnitude of a block of a row, and an exact zero; rounds up
  or down at random such that the mean is exact. For moments. An exponential average moves by a few per cent a step at
  most, so it would stand still between two codes if it were rounded to nearest; and entries a thousand times smaller
  than their neighbour, which even spacing takes for zero, would divide by zero in `m / sqrt(v)`.
- *Dynamic*: of each decade below the largest magnitude of a block half as many codes as of the one above it; rounds to
  nearest. What others take for moments (arXiv 2110.02861), and here to compare with them.

Beside them signs, one bit each.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK_COLUMNS = 256  # numbers of a row that share one scale of the geometric and dynamic codes
CODES_PER_OCTAVE = 8  # neighbours of the geometric code differ by 2^(1/8), 9 %; a square root of them by 4.4 %
_TINY = torch.finfo(torch.float32).tiny


def code_columns(columns: int, bits: int) -> int:
    """Bytes that hold `columns` codes of 1, 4 or 8 bits."""
    return -(-columns * bits // 8)


def to_levels(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Asymmetric min-max codes, one bucket per row, rounded to nearest.

    Args:
        values: (l, n), float32 or float64.
        bits: 8 (255 steps between 256 levels) or 4 (15 steps between 16 levels, two codes per byte in order).

    Returns:
        Codes (l, n) or (l, ceil(n / 2)) uint8, and ranges (l, 2) float32: least value and step. A constant row has
        step 0 and comes back exactly; a row with a number that is not finite comes back as NaN.
    """
    levels = 2**bits - 1
    least = values.amin(dim=1, keepdim=True).float()  # (l, 1)
    step = ((values.amax(dim=1, keepdim=True) - least) / levels).float()  # (l, 1)
    position = (values - least).div_(torch.where(step > 0, step, 1))
    codes = position.round_().nan_to_num_(0).clamp_(0, levels).to(torch.uint8)
    return codes if bits == 8 else pack_nibbles(codes), torch.cat([least, step], dim=1)


def from_levels(codes: Tensor, ranges: Tensor, columns: int, bits: int, dtype: torch.dtype) -> Tensor:
    """The numbers (l, columns) of `to_levels`, within half a step."""
    least, step = torch.split(ranges.to(dtype), 1, dim=1)  # (l, 1) each
    unpacked = codes if bits == 8 else unpack_nibbles(codes, columns)
    return unpacked.to(dtype).mul_(step).add_(least)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes below 16, (l, n) uint8, two per byte: element 2 j in the low half of byte j, 2 j + 1 in the high half."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_nibbles` for rows of `columns` codes."""
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :columns]


def scale_columns(columns: int) -> int:
    """Blocks, each with its scale, in a row of `columns` geometric or dynamic codes."""
    return -(-columns // BLOCK_COLUMNS)


def to_geometric(values: Tensor, uniform: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes `c` of the magnitudes `scale 2^((c - C) / 8)`, rounded to a neighbour at random, the mean exact.

    Args:
        values: (l, r), float32 or float64; not negative unless `signed`.
        uniform: (l, r), random numbers in [0, 1) that decide the rounding.
        signed: int8 codes with C = 127 and the sign of the value, which reach down to 2^-15.75 of the scale; what is
            smaller becomes that or zero. Otherwise uint8 codes with C = 255, which reach down to 2^-31.75, so their
            square roots about as far; what is smaller and positive becomes that, never zero.

    Returns:
        Codes (l, r) int8 or uint8, and scales (l, ceil(r / 256)) float32: the largest magnitude of each block, which
        comes back exactly (in float32). Zero comes back as zero, a block with a number that is not finite as NaN.
    """
    top = 127 if signed else 255
    magnitude = values.abs()
    scales = _largest(magnitude)
    share = magnitude / _spread(scales, values).clamp(min=_TINY)  # (l, r), in [0, 1]
    code = share.log2().mul_(CODES_PER_OCTAVE).add_(top).clamp_(max=top)
    lower = code.floor().clamp_(min=1)
    step = 2 ** (1 / CODES_PER_OCTAVE) - 1
    # Above the lowest code: how far the value, not its logarithm, is on the way from this code to the next.
    upward = code.sub_(lower).div_(CODES_PER_OCTAVE).exp2_().sub_(1).div_(step)
    lower += uniform < upward
    least = 2.0 ** ((1 - top) / CODES_PER_OCTAVE)
    below = (uniform * least < share) if signed else (share > 0)
    lower = torch.where(share < least, below.to(lower.dtype), lower).nan_to_num_(0)
    if signed:
        return lower.mul_(values.sign().nan_to_num_(0)).to(torch.int8), scales
    return lower.to(torch.uint8), scales


def from_geometric(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers (l, r) of `to_geometric`."""
    top = 127 if codes.dtype == torch.int8 else 255
    code = codes.to(dtype)
    return code.abs().sub_(top).div_(CODES_PER_OCTAVE).exp2_().mul_(code.sign_()).mul_(_spread(scales, code))


@lru_cache
def dynamic_values(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers of the dynamic code in ascending order, float32: zero, one, and seven decades between them.

    Of the decade below 10^-d there are 2^(6 - d) (2^(7 - d) unless signed) positive numbers, the middles of as many
    equal parts of it; signed, as many negative ones.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        parts = 2 ** (6 - decade) * (1 if signed else 2)
        middles = [10.0**-decade * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
        found += middles + [-each for each in middles if signed]
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


def to_dynamic(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Dynamic codes, rounded to nearest.

    Args:
        values: (l, r), float32 or float64; not negative unless `signed`.

    Returns:
        Codes (l, r) uint8, and scales (l, ceil(r / 256)) float32: the largest magnitude of each block, at least 1e-12.
        A block with a number that is not finite comes back with NaN.
    """
    scales = _largest(values.abs()).clamp_(min=1e-12)
    share = values / _spread(scales, values)  # (l, r), in [-1, 1]
    known = dynamic_values(signed, values.device).to(values.dtype)
    middles = (known[1:] + known[:-1]) / 2
    return torch.bucketize(share, middles, out_int32=True, right=True).to(torch.uint8), scales


def from_dynamic(codes: Tensor, scales: Tensor, signed: bool, dtype: torch.dtype) -> Tensor:
    """The numbers (l, r) of `to_dynamic`."""
    known = dynamic_values(signed, codes.device).to(dtype)
    values = known[codes.int()]
    return values.mul_(_spread(scales, values))


def pack_signs(positive: Tensor) -> Tensor:
    """Booleans (l, n) as bits (l, ceil(n / 8)) uint8: element 8 j + k is bit k of byte j."""
    bits = torch.nn.functional.pad(positive.to(torch.uint8), (0, -positive.shape[1] % 8))
    packed = bits[:, ::8].clone()
    for k in range(1, 8):
        packed |= bits[:, k::8] << k
    return packed


def unpack_signs(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """1 where a bit of `pack_signs` is set and -1 where not, (l, columns)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(2) >> shifts).bitwise_and_(1).flatten(1)[:, :columns]
    return bits.to(dtype).mul_(2).sub_(1)


def _largest(magnitudes: Tensor) -> Tensor:
    """Of each block of a row, (l, ceil(r / 256)) float32."""
    blocks = torch.split(magnitudes, BLOCK_COLUMNS, dim=1)
    return torch.cat([block.amax(dim=1, keepdim=True) for block in blocks], dim=1).float()


def _spread(scales: Tensor, like: Tensor) -> Tensor:
    """The scale of each element, (l, r), or (l, 1) where all share it."""
    scales = scales.to(like.dtype)
    if scales.shape[1] == 1:
        return scales
    return scales.repeat_interleave(BLOCK_COLUMNS, dim=1)[:, : like.shape[1]]
