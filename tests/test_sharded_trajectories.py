"""World size and sharding do not change what the optimizers do: trajectories on 1, 2 and 4 processes are equal."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from collectives import CountCollectives
from processes import RankFailure, run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dist_lowrank.optim import DCTAdamW, Trion, columns, full_state_dict
from dist_lowrank.sharding.exchanged import FlatSlice
from dist_lowrank.sharding.layouts import tall_form
from dist_lowrank.sharding.pieces import FlatPart

STEPS = 20
CHECKED = (1, 7, STEPS)
# Rows that do not divide, fewer rows than ranks (ranks that hold nothing), left sides (an even size across), and
# parameters on the dense path, some of them smaller than the world.
SHAPES = {
    "tall.weight": (10, 6),
    "odd.weight": (7, 5),
    "few.weight": (3, 2),
    "wide.weight": (5, 12),
    "square.weight": (8, 8),
    "one.weight": (1, 8),
    "norm.weight": (6,),
    "bias.weight": (1,),
}
LOW_BIT = ["dct_adamw_int8", "dct_adamw_int4", "dct_adamw_bf16"]
STRATEGIES = ["ddp", "fsdp", "hsdp"]
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "dct_adamw": (DCTAdamW, {"lr": 0.01, "weight_decay": 0.1, "rank": 0.5}),
    "dct_adamw_every_third": (DCTAdamW, {"lr": 0.01, "rank": 0.5, "refresh_interval": 3, "ranking": "l1"}),
    "dct_adamw_feedback": (
        DCTAdamW,
        {"lr": 0.01, "rank": 0.5, "error_feedback": "fp32", "column_bias_correction": True},
    ),
    "dct_adamw_int8": (
        DCTAdamW,
        {"lr": 0.01, "rank": 0.5, "error_feedback": "int8", "moment_dtype": torch.int8, "column_bias_correction": True},
    ),
    "dct_adamw_int4": (
        DCTAdamW,
        {"lr": 0.01, "rank": 0.5, "error_feedback": "int4", "error_feedback_momentum": True, "refresh_interval": 3},
    ),
    "dct_adamw_bf16": (
        DCTAdamW,
        {"lr": 0.01, "rank": 0.5, "error_feedback": "bf16", "moment_dtype": torch.bfloat16},
    ),
    "dct_adamw_unsharded": (DCTAdamW, {"lr": 0.01, "rank": 0.5, "side": "unsharded"}),
    "trion": (Trion, {"lr": 0.01, "rank": 0.5}),
}


class Model(nn.Module):
    """Parameters alone; gradients are prescribed."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            child = nn.Module()
            child.weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
            self.add_module(name.removesuffix(".weight"), child)


def gradients(step: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def shard(model: nn.Module, strategy: str, world_size: int, rank: int | float) -> None:
    if strategy == "fsdp_rows":  # also where the rows axis is cut: exchanged
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
        return
    if strategy == "ddp":
        return  # the optimizer sees the plain parameters of the wrapped module
    if strategy == "fsdp":
        mesh = init_device_mesh("cpu", (world_size,))
    else:
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    left = {id(p) for p in model.parameters() if p.ndim == 2 and tall_form(p.shape, "shorter", rank).transposed}
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if id(p) in left else Shard(0))


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def random_cuts(shapes: dict[str, tuple[int, ...]], world_size: int) -> dict[str, list[tuple[int, int]]]:
    """Start and stop by rank: anywhere, also several within a row, also nothing."""
    generator = torch.Generator().manual_seed(world_size)
    cuts = {}
    for name, shape in shapes.items():
        inner = torch.randint(0, math.prod(shape) + 1, (world_size - 1,), generator=generator).sort().values.tolist()
        borders = [0, *inner, math.prod(shape)]
        cuts[name] = list(pairwise(borders))
    return cuts


def joined(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part.detach().clone())
    return torch.cat(parts).view(shape)


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
            elif isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = gradient
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


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if not name.endswith("unsharded")])
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
    if dtype == torch.float32 and optimizer in LOW_BIT:
        tolerance = 2e-3  # a sum in another order may, rarely, tip a stored number to the next one
    for weights, indices in run_on_ranks(world_size, trajectory, strategy, world_size, optimizer, dtype):
        for step in range(STEPS):
            assert indices[step].keys() == expected_indices[step].keys()
            for name in indices[step]:
                assert torch.equal(indices[step][name], expected_indices[step][name]), (step, name)
        for found, expected in zip(weights, expected_weights, strict=True):
            for name in SHAPES:
                torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=tolerance)


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
            gradient = (3 * gradient).round().to(torch.bfloat16)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = gradient
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


def _collectives(
    rank: int, strategy: str, world_size: int, optimizer: str, workspace_bytes: int | None = None
) -> list[list[tuple[str, int]]]:
    make, options = OPTIMIZERS[optimizer]
    model = Model(SHAPES, torch.float32)
    shard(model, strategy, world_size, options["rank"])
    if workspace_bytes is not None:
        options = {**options, "workspace_bytes": workspace_bytes}
    updater = make(model.named_parameters(), agree_on_gradients=False, **options)
    calls = []
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with CountCollectives() as counter:
            updater.step()
        calls.append(counter.calls)
    return calls


def matrix_forms(options: dict[str, Any]) -> list[Any]:
    return [tall_form(shape, "shorter", options["rank"]) for shape in SHAPES.values() if len(shape) == 2]


def test_dct_adamw_under_fsdp_sends_one_all_reduce_of_the_sum_of_all_n() -> None:
    sum_of_n = sum(form.n for form in matrix_forms(OPTIMIZERS["dct_adamw"][1]))
    for calls in run_on_ranks(4, _collectives, "fsdp", 4, "dct_adamw"):
        assert calls == [[("allreduce_", sum_of_n)]] * 4


def test_dct_adamw_sends_nothing_between_refreshes() -> None:
    for calls in run_on_ranks(2, _collectives, "fsdp", 2, "dct_adamw_every_third"):
        assert [len(step) for step in calls] == [1, 0, 1, 0]


def test_trion_under_fsdp_sends_two_all_reduces() -> None:
    forms = matrix_forms(OPTIMIZERS["trion"][1])
    expected = [("allreduce_", sum(form.n for form in forms)), ("allreduce_", sum(form.rank**2 for form in forms))]
    for calls in run_on_ranks(4, _collectives, "fsdp", 4, "trion"):
        assert calls == [expected] * 4


def test_misaligned_matrices_are_exchanged_in_one_all_to_all_and_their_sums_fused() -> None:
    """Under plain Shard(0) the two wide matrices are cut along the compressed axis; r x ranks > n, so rows go back."""
    world_size = 4
    forms = matrix_forms(OPTIMIZERS["dct_adamw"][1])
    wide = [form for form in forms if form.transposed]
    results = run_on_ranks(world_size, _collectives, "fsdp_rows", world_size, "dct_adamw")
    for calls in results:
        for step in calls:
            assert [name for name, _ in step] == ["alltoall_base_", "allreduce_", "alltoall_base_"]
            assert step[1][1] == sum(form.n for form in forms)
    for position in (0, 2):  # all ranks together send each matrix once, there and back
        sent = sum(calls[0][position][1] for calls in results)
        assert sent == sum(form.rows * form.n for form in wide)


def test_the_unsharded_side_never_exchanges_rows() -> None:
    forms = [tall_form(shape, "unsharded", 0.5) for shape in SHAPES.values() if len(shape) == 2]
    assert {form.side for form in forms} == {"right"}  # under Shard(0), also for wide matrices
    for calls in run_on_ranks(4, _collectives, "fsdp_rows", 4, "dct_adamw_unsharded"):
        assert calls == [[("allreduce_", sum(form.n for form in forms))]] * 4
    expected, _ = one_process("dct_adamw_unsharded", torch.float64)
    for weights, _ in run_on_ranks(3, trajectory, "fsdp_rows", 3, "dct_adamw_unsharded", torch.float64):
        for found, wanted in zip(weights, expected, strict=True):
            for name in SHAPES:
                torch.testing.assert_close(found[name], wanted[name], atol=1e-10, rtol=0)


@pytest.mark.parametrize("optimizer", ["dct_adamw", "trion"])
def test_ddp_moves_coefficients_not_matrices(optimizer: str) -> None:
    world_size = 4
    forms = matrix_forms(OPTIMIZERS[optimizer][1])
    padded_rows_by_rank = sum(-(-form.rows // world_size) * form.rank for form in forms)
    for calls in run_on_ranks(world_size, _collectives, "ddp", world_size, optimizer):
        for step in calls[1:]:  # the first step also compares the replicas
            gathers = [elements for name, elements in step if "gather" in name]
            assert gathers == [padded_rows_by_rank]
            sums = [elements for name, elements in step if "reduce" in name]
            assert sum(sums) == sum(form.n + (form.rank**2 if optimizer == "trion" else 0) for form in forms)
            assert len(step) == len(gathers) + len(sums)


def test_a_small_workspace_makes_more_waves_and_the_same_sums() -> None:
    sum_of_n = sum(form.n for form in matrix_forms(OPTIMIZERS["dct_adamw"][1]))
    for calls in run_on_ranks(2, _collectives, "fsdp", 2, "dct_adamw", 1):
        assert len(calls[0]) == 6
        assert sum(elements for _, elements in calls[0]) == sum_of_n


def _full_state(rank: int, strategy: str, world_size: int, optimizer: str) -> dict[str, Any]:
    make, options = OPTIMIZERS[optimizer]
    model = Model(SHAPES, torch.float64)
    shard(model, strategy, world_size, options["rank"])
    updater = make(model.named_parameters(), **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p) * torch.arange(p.shape[-1]).add(1).to(torch.float64)[-1]
    updater.step()
    gathered = full_state_dict(updater)
    fresh = make(model.named_parameters(), **options)
    fresh.load_state_dict(gathered)  # each rank takes its part
    for p, state in updater.state.items():
        for key, value in state.items():
            loaded = fresh.state[p][key]
            assert type(loaded) is type(value)
            assert loaded.dtype == value.dtype
            assert torch.equal(
                loaded.to_local() if isinstance(loaded, DTensor) else loaded,
                value.to_local() if isinstance(value, DTensor) else value,
            )
    assert any(isinstance(value, DTensor) for state in updater.state.values() for value in state.values())
    return {str(index): state for index, state in gathered["state"].items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_full_state_dict_has_global_shapes_and_loads_back(strategy: str) -> None:
    for states in run_on_ranks(4, _full_state, strategy, 4, "dct_adamw_feedback"):
        forms = matrix_forms({"rank": 0.5})
        for index, form in enumerate(forms):
            state = states[str(index)]
            assert state["exp_avg"].shape == (form.rows, form.rank)
            assert state["error_feedback"].shape == (form.rows, form.n)
            assert not any(isinstance(value, DTensor) for value in state.values())


def _state_after_steps(_: int, strategy: str, world_size: int, optimizer: str) -> dict[str, Any]:
    make, options = OPTIMIZERS[optimizer]
    model = Model(SHAPES, torch.float64)
    shard(model, strategy, world_size, options["rank"])
    updater = make(model.named_parameters(), **options)
    for step in range(1, 8):
        for name, gradient in gradients(step, SHAPES, torch.float64).items():
            parameter = model.get_parameter(name)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = gradient
        updater.step()
    return full_state_dict(updater)["state"]


@pytest.mark.parametrize("optimizer", LOW_BIT)
@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("fsdp", 4), ("hsdp", 4)])
def test_stored_codes_are_bitwise_those_of_one_process(strategy: str, world_size: int, optimizer: str) -> None:
    expected = _state_after_steps(0, "ddp", 1, optimizer)
    for found in run_on_ranks(world_size, _state_after_steps, strategy, world_size, optimizer):
        for index, state in expected.items():
            for key, wanted in state.items():
                if wanted.dtype.is_floating_point and wanted.dtype != torch.bfloat16:
                    torch.testing.assert_close(found[index][key], wanted, rtol=1e-6, atol=1e-6)
                else:
                    assert torch.equal(found[index][key], wanted), (index, key)


def _differing_replicas(rank: int) -> str:
    model = Model(SHAPES, torch.float32)
    if rank == 1:
        with torch.no_grad():
            model.get_parameter("odd.weight")[0, 0] += 1e-3
    updater = DCTAdamW(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="process_group") as caught:
        updater.step()
    return str(caught.value)


def test_replicas_that_differ_are_refused_on_every_rank_by_name() -> None:
    for message in run_on_ranks(3, _differing_replicas):
        assert "'odd.weight' (1 of 8 in all)" in message


def _own_group(rank: int) -> bool:
    groups = [torch.distributed.new_group([member]) for member in range(2)]
    torch.manual_seed(rank)
    parameter = nn.Parameter(torch.randn(6, 4))
    updater = DCTAdamW([parameter], process_group=groups[rank])
    parameter.grad = torch.randn(6, 4)
    updater.step()
    return True


def test_a_process_group_of_one_allows_a_model_of_its_own_on_each_rank() -> None:
    assert run_on_ranks(2, _own_group) == [True, True]


def _corrupted(rank: int) -> str:
    model = Model(SHAPES, torch.float32)
    shard(model, "fsdp_rows", 3, 0.5)
    updater = DCTAdamW(model.named_parameters(), rank=0.5, refresh_interval=10, verify_every=3)
    for step in range(1, 4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if step == 2 and rank == 1:
            updater.state[model.get_parameter("odd.weight")]["indices"] += 1
        if step == 3:
            with pytest.raises(RuntimeError) as caught:
                updater.step()
            return str(caught.value)
        updater.step()
    raise AssertionError


def test_a_rank_with_other_columns_is_named_with_the_parameter_on_every_rank() -> None:
    for message in run_on_ranks(3, _corrupted):
        assert "the directions chosen for 'odd.weight' on rank 1 are not those of rank 0" in message


def test_a_failing_rank_fails_the_test() -> None:
    with pytest.raises(RankFailure, match="rank 1"):
        run_on_ranks(2, _fail_on_rank_one)


def _fail_on_rank_one(rank: int) -> None:
    assert rank == 0
