"""Codes of four and eight bits: exact to their resolution, in order, row by row, unbiased if rounded at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from dist_lowrank.optim.quantization import (
    BLOCK_COLUMNS,
    code_columns,
    from_geometric,
    from_levels,
    pack_nibbles,
    scale_columns,
    to_geometric,
    to_levels,
    unpack_nibbles,
)

exploring = settings(max_examples=80, deadline=None, derandomize=True)
both_widths = pytest.mark.parametrize("bits", [8, 4])
# Float32 numbers of very different sizes, away from where float32 itself ends.
numbers = st.floats(-(2.0**60), 2.0**60, width=32).map(lambda x: x if abs(x) > 2.0**-60 else 0.0)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=numbers).map(
    lambda a: torch.from_numpy(a.copy())
)


def through_levels(values: Tensor, bits: int) -> Tensor:
    codes, ranges = to_levels(values, bits)
    assert codes.shape == (values.shape[0], code_columns(values.shape[1], bits))
    assert codes.dtype == torch.uint8
    assert ranges.shape == (values.shape[0], 2)
    assert ranges.dtype == torch.float32
    return from_levels(codes, ranges, values.shape[1], bits, values.dtype)


def half_a_step(values: Tensor, bits: int) -> Tensor:
    """From the formula, per row (l, 1)."""
    return (values.amax(1, keepdim=True) - values.amin(1, keepdim=True)) / (2**bits - 1) / 2


@both_widths
@given(values=matrices)
@exploring
def test_an_error_is_at_most_half_a_step_of_its_row(values: Tensor, bits: int) -> None:
    error = (through_levels(values, bits) - values).abs()
    rounding = 2.0**-22 * values.abs().amax(1, keepdim=True)  # of float32
    assert (error <= half_a_step(values, bits) * (1 + 1e-4) + rounding).all()


@both_widths
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 16, 255, 256, 1001])
def test_an_arange_keeps_its_order(columns: int, bits: int) -> None:
    values = torch.arange(columns, dtype=torch.float32).repeat(2, 1)
    values[1] = values[1].flip(0)
    back = through_levels(values, bits)
    assert (back[0].diff() >= 0).all()
    assert (back[1].diff() <= 0).all()
    assert ((back - values).abs() <= half_a_step(values, bits) * (1 + 1e-4)).all()
    if columns <= 2**bits and (2**bits - 1) % max(1, columns - 1) == 0:
        torch.testing.assert_close(back, values)  # every number is a level


@given(codes=arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 15)))
@exploring
def test_packing_two_codes_per_byte_keeps_them_in_order(codes: np.ndarray) -> None:
    plain = torch.from_numpy(codes.copy())
    packed = pack_nibbles(plain)
    assert packed.shape == (plain.shape[0], -(-plain.shape[1] // 2))
    assert torch.equal(unpack_nibbles(packed, plain.shape[1]), plain)


def test_eight_bits_are_seventeen_times_as_exact_as_four() -> None:
    values = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = {bits: through_levels(values, bits) - values for bits in (8, 4)}
    step_of_four = 2 * half_a_step(values, 4)
    assert (errors[8].abs() <= step_of_four / 2 / 17 * (1 + 1e-4)).all()  # no error of 8 bits is larger than that
    assert errors[4].abs().amax() > 0.99 * (step_of_four / 2).amin()  # and 4 bits do use their half step
    ratio = errors[4].square().mean().sqrt() / errors[8].square().mean().sqrt()
    assert float(ratio) == pytest.approx(17, rel=0.01)
    relative = errors[8].square().mean().sqrt() / values.square().mean().sqrt()
    assert float(relative) < 0.01  # true 8 bits; 16 levels in 8 bits would have 0.12


@both_widths
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-30, 1e30, -0.1])
@pytest.mark.parametrize("columns", [1, 2, 5])
def test_constant_and_one_element_rows_come_back_exactly(columns: int, value: float, bits: int) -> None:
    values = torch.full((3, columns), value)
    assert torch.equal(through_levels(values, bits), values)


@both_widths
def test_state_of_zeros_means_zero_and_no_rows_are_no_problem(bits: int) -> None:
    codes, ranges = to_levels(torch.zeros(2, 5), bits)
    assert (codes == 0).all()
    assert (ranges == 0).all()
    assert through_levels(torch.zeros(0, 5), bits).shape == (0, 5)


@both_widths
def test_a_row_with_a_number_that_is_not_finite_becomes_nan_and_no_other(bits: int) -> None:
    values = torch.ones(4, 3)
    values[0, 1], values[1, 0], values[2, 2] = float("nan"), float("inf"), float("-inf")
    back = through_levels(values, bits)
    assert back[:3].isnan().all()
    assert (back[3] == 1).all()


@both_widths
@given(values=matrices, cut=st.integers(0, 9))
@exploring
def test_blocks_of_rows_give_what_all_rows_give(values: Tensor, cut: int, bits: int) -> None:
    whole = to_levels(values, bits)
    parts = [to_levels(part, bits) for part in (values[:cut], values[cut:]) if len(part)]
    for index in range(2):
        assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])


# The geometric code


signs = pytest.mark.parametrize("signed", [True, False])


def draw(rows: int, columns: int, signed: bool, octaves: float = 10.0) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    values = torch.exp2(-octaves * torch.rand(rows, columns, generator=generator, dtype=torch.float64))
    values *= torch.randint(0, 2, (rows, columns), generator=generator).mul_(2).sub_(1) if signed else 1
    return values


def uniform(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@signs
@pytest.mark.parametrize("columns", [1, 2, 255, 256, 257, 600])
def test_a_geometric_code_is_within_one_step_and_its_largest_is_exact(columns: int, signed: bool) -> None:
    values = draw(5, columns, signed)
    codes, scales = to_geometric(values, uniform(values.shape), signed=signed)
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    assert scales.shape == (5, scale_columns(columns))
    back = from_geometric(codes, scales, values.dtype)
    assert ((back / values).log2().abs() <= 1 / 8 + 1e-6).all()
    for block, of_block in zip(values.split(BLOCK_COLUMNS, 1), back.split(BLOCK_COLUMNS, 1), strict=True):
        torch.testing.assert_close(of_block.abs().amax(1), block.abs().amax(1), rtol=1e-7, atol=0)


@signs
def test_a_geometric_code_is_exact_in_the_mean(signed: bool) -> None:
    octaves = 20.0 if signed else 10.0  # signed: also below the lowest code, between it and zero
    values, draws = draw(1, 40, signed, octaves), 4000
    codes, scales = to_geometric(values.expand(draws, -1), uniform((draws, 40)), signed=signed)
    back = from_geometric(codes, scales, values.dtype)
    standard_error = back.std(0) / draws**0.5
    assert ((back.mean(0) - values[0]).abs() <= 4.5 * standard_error + 1e-6 * values[0].abs()).all()
    assert (back.std(0) > 0).sum() > 30  # it did round


@signs
def test_a_geometric_zero_is_exact_and_only_a_sign_lets_small_numbers_become_zero(signed: bool) -> None:
    values = torch.tensor([[1.0, 0.0, 1e-20, 2.0**-40], [0.0, 0.0, 0.0, 0.0]])
    codes, scales = to_geometric(values, torch.full_like(values, 0.5), signed=signed)
    back = from_geometric(codes, scales, torch.float32)
    assert back[0, 0] == 1
    assert back[0, 1] == 0
    assert (back[1] == 0).all()
    assert (back[0, 2:] == (0 if signed else 2.0 ** (-254 / 8))).all()


@signs
def test_a_geometric_block_that_is_not_finite_becomes_nan(signed: bool) -> None:
    values = torch.ones(3, 300)
    values[0, 5], values[1, 5] = float("nan"), float("inf")
    back = from_geometric(*to_geometric(values, torch.zeros_like(values), signed=signed), torch.float32)
    assert back[:2, :256].isnan().all()
    assert (back[:2, 256:] == 1).all()
    assert (back[2] == 1).all()


@signs
def test_geometric_codes_of_blocks_of_rows_are_those_of_all_rows(signed: bool) -> None:
    values, random = draw(7, 300, signed).float(), uniform((7, 300)).float()
    whole = to_geometric(values, random, signed=signed)
    for cut in range(8):
        parts = [to_geometric(values[s], random[s], signed=signed) for s in (slice(cut), slice(cut, 7))]
        for index in range(2):
            assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])
