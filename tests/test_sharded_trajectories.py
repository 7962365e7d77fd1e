"""World size and sharding do not change what the optimizers do: trajectories on 1, 2 and 4 processes are equal."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from sharded_models import (
    LOW_BIT,
    OPERANDS,
    OPTIMIZERS,
    SHAPES,
    Model,
    full,
    gradients,
    joined,
    placed_as,
    random_cuts,
    shard,
)
from support_matrix import supports
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from dist_lowrank.optim import DCTAdamW, Trion, columns
from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.layouts import tall_form
from dist_lowrank.sharding.pieces import FlatPart

STEPS = 20
CHECKED = (1, 7, STEPS)


def trajectory(
    rank: int, strategy: str, world_size: int, optimizer: str, dtype: torch.dtype, shapes: Any = None
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Full weights after the steps of CHECKED, and this rank's indices after every step."""
    shapes = shapes or SHAPES
    make, options = OPTIMIZERS[optimizer]
    model = Model(shapes, dtype)
    cuts = random_cuts(shapes, world_size) if strategy == "flat" else {}
    if strategy == "flat":
        named = [
            (name, nn.Parameter(p.detach().flatten()[slice(*cuts[name][rank])])) for name, p in model.named_parameters()
        ]
        updater = make(named, **options)
        slices = {name: tuple(FlatSlice(shapes[name], *cut) for cut in cuts[name]) for name, _ in named}
        updater.declare_flat_parts({p: [FlatPart(name, 0, slices[name])] for name, p in named}, dist.group.WORLD)
    else:
        shard(model, strategy, world_size, options["rank"])
        named = list(model.named_parameters())
        updater = make(named, **options)
    weights, indices = [], []
    for step in range(1, STEPS + 1):
        for name, gradient in gradients(step, shapes, dtype).items():
            parameter = dict(named)[name]
            if strategy == "flat":
                gradient = gradient.flatten()[slice(*cuts[name][rank])]
            parameter.grad = placed_as(parameter, gradient)
        updater.step()
        if step in CHECKED:
            weights.append({name: full(p) if not cuts else joined(p, shapes[name]) for name, p in named})
        indices.append(
            {
                matrix.name: matrix.state(updater.state[matrix.parameter])["indices"].clone()
                for matrix in updater._matrices()
            }
        )
    return weights, indices


def assert_same_weights(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in other:
            torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=tolerance)


def assert_same_indices(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for step, (one, other) in enumerate(zip(found, expected, strict=True), start=1):
        assert one.keys() == other.keys()
        for name in other:
            assert torch.equal(one[name], other[name]), (step, name)


@cache
def one_process(optimizer: str, dtype: torch.dtype) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    return trajectory(0, "ddp", 1, optimizer, dtype)


@cache
def smallest_score_gap(optimizer: str, dtype: torch.dtype) -> float:
    """Over the one-process run: the least relative distance of the last chosen score from the first not chosen."""
    gaps = []
    choose = columns.top_columns

    def measure(scores: Tensor, rank: int) -> Tensor:
        ordered = scores.sort(descending=True).values
        if rank < len(ordered):
            gaps.append(float((ordered[rank - 1] - ordered[rank]) / ordered[rank - 1]))
        return choose(scores, rank)

    with mock.patch.object(columns, "top_columns", measure):
        trajectory(0, "ddp", 1, optimizer, dtype)
    assert len(gaps) > STEPS
    return min(gaps)


SHARDINGS = [
    *(("ddp", world_size) for world_size in (1, 2, 3, 4)),
    *(("fsdp", world_size) for world_size in (1, 2, 4)),
    *(("fsdp_rows", world_size) for world_size in (2, 3, 4)),
    *(("flat", world_size) for world_size in (1, 2, 3, 4)),
    *(("hsdp", world_size) for world_size in (2, 4)),
]


@supports("exact")
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("dct_adamw_previous", *OPERANDS) else ())
        for name in OPTIMIZERS
        if not name.endswith("unsharded")
    ],
)
@pytest.mark.parametrize(
    ("strategy", "world_size", "dtype"),
    [(*sharding, torch.float64) for sharding in SHARDINGS]
    + [(*sharding, torch.float32) for sharding in SHARDINGS if sharding[1] in (2, 4)],
)
def test_sharded_trajectory_equals_one_process(
    strategy: str, world_size: int, optimizer: str, dtype: torch.dtype
) -> None:
    expected_weights, expected_indices = one_process(optimizer, dtype)
    if dtype == torch.float32:
        assert smallest_score_gap(optimizer, dtype) > 2e-5  # rounding cannot swap two columns
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    if OPTIMIZERS[optimizer][1].get("error_feedback") == "fp32":
        tolerance = max(tolerance, 1e-5)  # what is stored in float32 rounds in float32
    if dtype == torch.float32 and optimizer in (*LOW_BIT, *OPERANDS):
        tolerance = 2e-3  # a sum in another order may, rarely, tip a stored number to the next one
    for weights, indices in run_on_ranks(world_size, trajectory, strategy, world_size, optimizer, dtype):
        assert_same_indices(indices, expected_indices)
        assert_same_weights(weights, expected_weights, tolerance)


# Sums of small integers are exact in any order, and the identity has no products to sum: what is left is element by
# element, and the random bits, which must not depend on who rounds.
EXACT: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "dct_adamw": (
        DCTAdamW,
        {
            "lr": 0.01,
            "rank": 0.5,
            "dictionary": "identity",
            "refresh_interval": 2,
            "moment_dtype": torch.int8,
            "weight_rounding": "stochastic",
            "seed": 5,
        },
    ),
    "dense": (DCTAdamW, {"lr": 0.01, "rank": 0.5, "low_rank": False, "weight_rounding": "stochastic"}),
    "trion": (Trion, {"lr": 0.01, "rank": 0.5, "dense_lr": 0.01, "weight_rounding": "stochastic"}),
    "dct2": (DCTAdamW, {"lr": 0.01, "rank": 0.5, "weight_rounding": "stochastic"}),
}


def _rounded(_: int, strategy: str, world_size: int, optimizer: str) -> list[dict[str, Tensor]]:
    make, options = EXACT[optimizer]
    model = Model(SHAPES, torch.bfloat16)
    shard(model, strategy, world_size, options["rank"])
    low_rank = {"low_rank": options.get("low_rank", True)}
    options = {key: value for key, value in options.items() if key != "low_rank"}
    updater = make([{"params": list(model.named_parameters()), **low_rank}], **options)
    weights = []
    for step in range(1, 11):
        for name, gradient in gradients(step, SHAPES, torch.float64).items():
            parameter = model.get_parameter(name)
            parameter.grad = placed_as(parameter, (3 * gradient).round().to(torch.bfloat16))
        updater.step()
        weights.append({name: full(p) for name, p in model.named_parameters()})
    return weights


@pytest.mark.parametrize("optimizer", EXACT)
@pytest.mark.parametrize(
    ("strategy", "world_size"), [("ddp", 2), ("ddp", 4), ("fsdp", 1), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]
)
def test_weights_rounded_at_random_are_the_same_under_every_sharding(
    strategy: str, world_size: int, optimizer: str
) -> None:
    expected = _rounded(0, "ddp", 1, optimizer)
    for weights in run_on_ranks(world_size, _rounded, strategy, world_size, optimizer):
        for found, wanted in zip(weights, expected, strict=True):
            for name in SHAPES:
                if optimizer in ("dct_adamw", "dense"):
                    assert torch.equal(found[name], wanted[name]), name
                else:  # a sum in another order may, rarely, tip an element to the neighbouring bf16
                    torch.testing.assert_close(found[name], wanted[name], rtol=2.0**-7, atol=2.0**-7)
                    assert (found[name] != wanted[name]).sum() <= 1


def _shards(rank: int) -> list[tuple[int, ...]]:
    model = Model(SHAPES, torch.float32)
    shard(model, "fsdp", 4, 0.5)
    return [tuple(p.to_local().shape) for p in model.parameters()]


def test_the_shapes_give_uneven_and_empty_shards() -> None:
    shards = run_on_ranks(4, _shards)
    assert [shapes[0] for shapes in shards] == [(3, 6), (3, 6), (3, 6), (1, 6)]
    assert shards[3][2] == (0, 2)
    assert [shapes[3] for shapes in shards] == [(5, 3)] * 4  # the left side is cut along dimension 1


@supports("exact", strategy="FSDP2", optimizer="DCTAdamW", variant='`side="unsharded"` under `Shard(0)`')
def test_the_unsharded_side_under_shard_0_equals_one_process() -> None:
    expected, _ = one_process("dct_adamw_unsharded", torch.float64)
    for weights, _ in run_on_ranks(3, trajectory, "fsdp_rows", 3, "dct_adamw_unsharded", torch.float64):
        assert_same_weights(weights, expected, 1e-10)


# Sizes that divide, as `Shard(1)` asks for.
EVEN_SHAPES = {"tall.weight": (12, 8), "wide.weight": (8, 12), "square.weight": (8, 8), "norm.weight": (8,)}


def _side(_: int, axis: int | None, world_size: int, optimizer: str, side: str) -> list[dict[str, Tensor]]:
    """Weights after each step, every matrix sharded along `axis`; None: one process."""
    make, options = OPTIMIZERS[optimizer]
    model = Model(EVEN_SHAPES, torch.float64)
    if axis is not None:
        mesh = init_device_mesh("cpu", (world_size,))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(axis if p.ndim == 2 else 0))
    updater = make(model.named_parameters(), **options, side=side)
    weights = []
    for step in range(1, STEPS + 1):
        for name, gradient in gradients(step, EVEN_SHAPES, torch.float64).items():
            parameter = model.get_parameter(name)
            parameter.grad = placed_as(parameter, gradient)
        updater.step()
        weights.append({name: full(p) for name, p in model.named_parameters()})
    return weights


@supports("exact", strategy="FSDP2")
@pytest.mark.parametrize("optimizer", ["dct_adamw", "trion"])
@pytest.mark.parametrize("side", ["shorter", "longer", "right", "left"])
@pytest.mark.parametrize("axis", [0, 1])
def test_both_sides_under_both_shard_dimensions_equal_one_process(axis: int, side: str, optimizer: str) -> None:
    expected = _side(0, None, 1, optimizer, side)
    for weights in run_on_ranks(4, _side, axis, 4, optimizer, side):
        assert_same_weights(weights, expected, 1e-10)


@supports(
    "differs",
    strategy="FSDP2",
    variant='`side="unsharded"` under `Shard(1)`',
    reason="the axis that is not sharded is compressed, 0 there and 1 in one process: the numbers are those of "
    '`side="left"`',
)
@pytest.mark.parametrize("optimizer", ["dct_adamw", "trion"])
def test_the_unsharded_side_under_shard_1_is_the_left_side_and_differs_from_one_process(optimizer: str) -> None:
    left, one = _side(0, None, 1, optimizer, "left"), _side(0, None, 1, optimizer, "unsharded")
    for weights in run_on_ranks(2, _side, 1, 2, optimizer, "unsharded"):
        assert_same_weights(weights, left, 1e-10)
        for name in EVEN_SHAPES:
            same = torch.allclose(weights[-1][name], one[-1][name], atol=1e-6)
            assert same == (name == "norm.weight"), name


def _tied(rank: int) -> dict[str, list[int]]:
    model = Model(SHAPES, torch.float64)
    shard(model, "fsdp_rows", 4, 0.5)
    updater = DCTAdamW(model.named_parameters(), rank=0.5, dictionary="identity")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    updater.step()
    states = {name: updater.state[p] for name, p in model.named_parameters()}
    return {name: state["indices"].tolist() for name, state in states.items() if "indices" in state}


def test_tied_scores_choose_the_first_columns_on_every_rank() -> None:
    for indices in run_on_ranks(4, _tied):
        assert indices == {
            name: list(range(tall_form(shape, "shorter", 0.5).rank))
            for name, shape in SHAPES.items()
            if len(shape) == 2
        }


@pytest.mark.slow
@supports("exact")
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if not name.endswith("unsharded")])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_rows", "hsdp", "flat"])
def test_the_trajectory_on_8_ranks_equals_one_process(strategy: str, optimizer: str) -> None:
    shapes = SHAPES | {"wide.weight": (5, 16)}  # divides by 8
    expected, expected_indices = trajectory(0, "ddp", 1, optimizer, torch.float64, shapes)
    tolerance = 1e-5 if OPTIMIZERS[optimizer][1].get("error_feedback") == "fp32" else 1e-10
    for weights, indices in run_on_ranks(8, trajectory, strategy, 8, optimizer, torch.float64, shapes):
        assert_same_indices(indices, expected_indices)
        assert_same_weights(weights, expected, tolerance)
