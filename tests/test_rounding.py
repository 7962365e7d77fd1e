"""Random bits belong to elements, and bf16 weights rounded with them keep, in the mean, what nearest loses."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from trajectories import MIXED_SHAPES, both, make, make_gradients, make_parameters

from dist_lowrank.optim import rounding
from dist_lowrank.optim.rounding import RandomBits, positions_of, round_stochastically, row_chunks, store_weight


def bits(count: int, seed: int = 0, name: str = "w", step: int = 1, purpose: str = "weight") -> Tensor:
    return RandomBits(seed, name, step).at(purpose, torch.arange(count))


def test_bits_are_the_same_at_every_call_and_differ_with_everything_they_depend_on() -> None:
    reference = bits(4096)
    assert torch.equal(bits(4096), reference)
    assert torch.equal(RandomBits(0, "w", 1).at("weight", torch.arange(1000, 1100)), reference[1000:1100])
    for other in (bits(4096, seed=1), bits(4096, name="v"), bits(4096, step=2), bits(4096, purpose="exp_avg")):
        assert (other == reference).sum() <= 1
    far = RandomBits(0, "w", 1).at("weight", torch.arange(4096) + 2**32)  # beyond 32 bits of position
    assert (far == reference).sum() <= 1


def test_bits_are_uniform_and_independent_of_their_neighbours_and_of_other_steps() -> None:
    count = 2**16
    drawn = [bits(count, step=step) for step in range(1, 9)]
    for values in drawn:
        assert values.min() >= 0
        assert values.max() < 2**32
        for bit in range(32):
            ones = (values >> bit & 1).sum()
            assert abs(int(ones) - count / 2) < 5 * (count / 4) ** 0.5, bit
        low = (values & 0xFFFF).double() / 2**16
        assert abs(float(torch.corrcoef(torch.stack([low[1:], low[:-1]]))[0, 1])) < 5 / count**0.5
        assert torch.bincount(values & 0xFF, minlength=256).float().var() < 2 * count / 256
    correlations = torch.corrcoef(torch.stack([(values & 0xFFFF).double() for values in drawn]))
    assert correlations.fill_diagonal_(0).abs().max() < 5 / count**0.5


def test_the_mean_of_many_roundings_is_the_number() -> None:
    steps, value = 400, 1 + 2.0**-10  # an eighth of the way from 1 to the next bf16, 1 + 2^-7
    rounded = torch.stack(
        [round_stochastically(torch.full((64,), value), bits(64, step=step)) for step in range(steps)]
    ).double()
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2.0**-7}
    count = rounded.numel()
    standard_error = 2.0**-7 * (1 / 8 * 7 / 8 / count) ** 0.5
    assert abs(float(rounded.mean()) - value) < 4 * standard_error
    per_element = rounded.mean(0) - value  # over steps: no element is always raised or always lowered
    assert (per_element.abs() < 5 * 2.0**-7 * (1 / 8 * 7 / 8 / steps) ** 0.5).all()


def every_bfloat16() -> Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_what_bfloat16_represents_stays_also_nan_infinities_and_signed_zeros() -> None:
    values = every_bfloat16()
    for pattern in (0, 0xFFFF, 0xFFFFFFFF):
        rounded = round_stochastically(values.float(), torch.full(values.shape, pattern))
        assert torch.equal(rounded.isnan(), values.isnan())
        kept = ~values.isnan()
        assert torch.equal(rounded[kept].view(torch.int16), values[kept].view(torch.int16))


def test_every_number_goes_to_one_of_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(-(2**31), 2**31, (2**16,), generator=generator).to(torch.int32)
    values = pattern.view(torch.float32)
    values = values[values.abs() < torch.finfo(torch.bfloat16).max]
    down = (values.view(torch.int32) & -0x10000).view(torch.float32)
    up = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)  # away from zero
    rounded = round_stochastically(values, bits(len(values))).float()
    assert ((rounded == down) | (rounded == up)).all()
    assert torch.equal(round_stochastically(values, torch.zeros(len(values), dtype=torch.int64)).float(), down)


def test_a_finite_number_overflows_only_where_nearest_does() -> None:
    largest = torch.finfo(torch.bfloat16).max
    patterns = torch.tensor([0, 0x7FFF, 0x8000, 0xFFFF])
    for factor in (1 - 2.0**-9, 1.0, 1 + 2.0**-12, 1 + 2.0**-10, 1 + 2.0**-9.5):
        for sign in (1, -1):
            values = torch.full((4,), sign * largest * factor)
            assert values.isfinite().all()
            rounded = round_stochastically(values, patterns)
            if factor <= 1:
                assert rounded.isfinite().all()
            else:
                assert torch.equal(rounded, values.bfloat16())


def test_positions_are_row_major_in_the_global_tensor() -> None:
    whole = torch.arange(4 * 5 * 6).view(4, 5, 6)
    found = positions_of((2, 3, 6), (1, 2, 0), (4, 5, 6), torch.device("cpu"))
    assert torch.equal(found, whole[1:3, 2:5])


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (2, 3, 4), (0, 5), (5, 0)], ids=str)
def test_chunks_change_nothing(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    results = []
    for elements in (1, 4, 2**20):
        parameter = Parameter(torch.zeros(shape, dtype=torch.bfloat16))
        with mock.patch.object(rounding, "CHUNK_ELEMENTS", elements):
            offset = (0,) * len(shape)
            store_weight(parameter.detach(), values, "stochastic", RandomBits(0, "w", 1), offset, shape)
        results.append(parameter.detach())
    assert all(torch.equal(result, results[0]) for result in results)
    assert list(row_chunks(5, 2**20)) == [slice(i, i + 1) for i in range(5)]


@both
def test_stochastic_rounding_moves_weights_that_nearest_leaves(kind: str) -> None:
    """Steps of at most 2^-11 at weights of 1: a quarter of what nearest rounds away."""
    options = {"lr": 2.0**-11, "weight_decay": 0.0, "rank": 1.0, "dictionary": "identity"}
    if kind == "trion":
        options |= {"lr": 2.0**-9, "dense_lr": 2.0**-11, "scale": "none"}  # its steps are smaller
    moved = {}
    for weight_rounding in ("nearest", "stochastic"):
        parameters = [Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in MIXED_SHAPES]
        wide = [Parameter(torch.ones(shape)) for shape in MIXED_SHAPES]
        narrow_optimizer = make(kind, parameters, weight_rounding=weight_rounding, **options)
        wide_optimizer = make(kind, wide, **options)
        for _ in range(64):
            for p, q in zip(parameters, wide, strict=True):
                p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
            narrow_optimizer.step()
            wide_optimizer.step()
        moved[weight_rounding] = torch.stack([1 - p.detach().float().mean() for p in parameters])
        expected = torch.stack([1 - q.detach().mean() for q in wide])
    assert (moved["nearest"] == 0).all()
    assert (expected > 0.005).all()
    torch.testing.assert_close(moved["stochastic"], expected, rtol=0.2, atol=0.002)


@both
def test_stochastic_rounding_repeats_itself_and_follows_seed_and_name(kind: str) -> None:
    def trained(seed: int, prefix: str) -> list[Tensor]:
        parameters = make_parameters(MIXED_SHAPES, torch.bfloat16)
        named = [(f"{prefix}.{i}", p) for i, p in enumerate(parameters)]
        optimizer = make(kind, named, weight_rounding="stochastic", seed=seed)
        for gradients in make_gradients(MIXED_SHAPES, 3):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.bfloat16()
            optimizer.step()
        return [p.detach() for p in parameters]

    reference = trained(0, "layer")
    for same in (trained(0, "layer"), trained(0, "module.layer")):
        assert all(torch.equal(a, b) for a, b in zip(same, reference, strict=True))
    for other in (trained(1, "layer"), trained(0, "block")):
        assert all(not torch.equal(a, b) for a, b in zip(other, reference, strict=True))


@both
def test_float32_weights_do_not_notice_the_rounding(kind: str) -> None:
    results = []
    for weight_rounding in ("nearest", "stochastic"):
        parameters = make_parameters(MIXED_SHAPES, torch.float32)
        optimizer = make(kind, parameters, weight_rounding=weight_rounding)
        for gradients in make_gradients(MIXED_SHAPES, 3):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.float()
            optimizer.step()
        results.append([p.detach() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
