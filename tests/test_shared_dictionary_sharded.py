"""Shared dictionaries under every sharding, saved and continued within an interval, and what they send."""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import Any
from unittest import mock

import pytest
import test_pieces
import torch
import torch.distributed as dist
from collectives import CountCollectives
from processes import run_on_ranks
from sharded_models import Model, full, gradients, joined, placed_as, random_cuts, shard
from torch import Tensor
from torch.nn import Parameter

from dist_lowrank.optim import DCTAdamW, Fira, Trion
from dist_lowrank.optim.state_dict import full_state_dict
from dist_lowrank.optim.traffic import collectives_of_step
from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.pieces import FlatPart

# On gloo, by the words of torch.distributed.
NAMES = {"all_reduce": "allreduce_", "all_gather": "allgather_", "all_to_all": "alltoall_base_"}

# Uneven and empty shards, left sides, two matrices or one to a role, and parameters on the dense path.
SHAPES = {
    "q0.weight": (10, 6),
    "q1.weight": (7, 6),
    "few0.weight": (3, 2),
    "few1.weight": (3, 2),
    "wide0.weight": (5, 12),
    "wide1.weight": (5, 8),
    "square.weight": (8, 8),
    "one.weight": (1, 8),
    "norm.weight": (6,),
    "bias.weight": (1,),
}
SHARDED_STEPS, INTERVAL, SAVED_AFTER = 12, 4, 6
COMMON: dict[str, Any] = {"lr": 0.01, "rank": 0.5, "verify_every": 3}
SHARDED: dict[str, tuple[Any, dict[str, Any]]] = {
    "dct_adamw": (
        DCTAdamW,
        {"refresh_interval": 2, "error_feedback": "fp32", "error_feedback_momentum": True, "dictionary": "shared"},
    ),
    "trion": (Trion, {"dictionary": "shared"}),
    "fira": (Fira, {"refresh_interval": 2, "subspace": "shared", "transition": "move"}),
}
Cuts = dict[str, tuple[int, int]]  # by name: the elements that this rank has of it in the flat tensor


def _make(method: str, named: list[tuple[str, Parameter]], **options: Any) -> Any:
    make, own = SHARDED[method]
    return make(named, **COMMON, **own, dictionary_interval=INTERVAL, **options)


def _in_one(values: dict[str, Tensor], own: Cuts) -> Tensor:
    """One flat tensor with this rank's part of each, as DeepSpeed makes it."""
    return torch.cat([values[name].detach().flatten()[slice(*cut)] for name, cut in own.items()])


def _broken_run(rank: int, strategy: str, world_size: int, method: str, workspace_bytes: int) -> Any:
    """Weights at the end of a run that was saved and resumed within an interval, its dictionaries, keys and traffic."""
    model, flat, own = Model(SHAPES, torch.float64), None, {}
    if strategy == "flat":
        cuts = random_cuts(SHAPES, world_size)
        own = {name: each[rank] for name, each in cuts.items()}
        flat = Parameter(_in_one(dict(model.named_parameters()), own))
        positions = accumulate((stop - start for start, stop in own.values()), initial=0)
        parts = [
            FlatPart(name, position, tuple(FlatSlice(SHAPES[name], *cut) for cut in cuts[name]))
            for name, position in zip(own, positions, strict=False)
        ]
        named = [("flat", flat)]
    else:
        shard(model, strategy, world_size, COMMON["rank"])
        named = list(model.named_parameters())

    def fresh() -> Any:
        updater = _make(method, named, workspace_bytes=workspace_bytes)
        if flat is not None:
            updater.declare_flat_parts({flat: parts}, dist.group.WORLD)
        return updater

    updater, traffic = fresh(), []
    for step in range(1, SHARDED_STEPS + 1):
        whole = gradients(step, SHAPES, torch.float64)
        for name, parameter in named:
            parameter.grad = _in_one(whole, own) if flat is not None else placed_as(parameter, whole[name])
        recipe = updater.recipe(updater.param_groups[0])
        changes = (step - recipe.refresh_after_first) % INTERVAL == 0
        predicted = collectives_of_step(updater, refresh=recipe.refreshes(step), dictionaries=changes)
        with CountCollectives() as counter:
            updater.step()
        if step not in (1, SAVED_AFTER + 1) and updater._steps % COMMON["verify_every"]:  # those compare ranks, too
            calls = zip(counter.calls, counter.sent_bytes, strict=True)
            sent = [(name, elements, size) for (name, elements), size in calls]
            traffic.append(([(NAMES[each.operation], each.elements, each.bytes) for each in predicted], sent))
        if step == SAVED_AFTER:
            saved = full_state_dict(updater)
            updater = fresh()
            updater.load_state_dict(saved)
    if flat is None:
        weights = {name: full(p) for name, p in named}
    else:
        held = torch.split(flat.detach(), [stop - start for start, stop in own.values()])
        weights = {name: joined(part, SHAPES[name]) for name, part in zip(own, held, strict=True)}
    states = [(name, key, value) for name, p in named for key, value in updater.state[p].items()]
    learned = [value.clone() for _, key, value in states if key.endswith("dictionary")]
    return weights, learned, [(name, key) for name, key, _ in states], traffic


def _broken_runs(rank: int, world_size: int, cases: list[tuple[str, str]]) -> dict[Any, Any]:
    return {
        (strategy, method): _broken_run(rank, strategy, world_size, method, 2**20 if method == "fira" else 700)
        for strategy, method in cases
    }


@cache
def _unbroken(method: str) -> dict[str, Tensor]:
    model = Model(SHAPES, torch.float64)
    updater = _make(method, list(model.named_parameters()))
    for step in range(1, SHARDED_STEPS + 1):
        for name, gradient in gradients(step, SHAPES, torch.float64).items():
            model.get_parameter(name).grad = gradient
        updater.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


ALL = ("ddp", "fsdp", "fsdp_rows", "flat")


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (1, [("fsdp", "dct_adamw"), ("flat", "fira")]),
        (2, [(strategy, method) for method in ("dct_adamw", "fira") for strategy in ALL]),
        (4, [("ddp", "fira"), ("fsdp_rows", "trion"), ("flat", "dct_adamw"), ("hsdp", "trion")]),
        pytest.param(
            4, [(strategy, method) for strategy in (*ALL, "hsdp") for method in SHARDED], marks=pytest.mark.slow
        ),
    ],
    ids=["1", "2", "4", "4, all"],
)
def test_sharded_and_resumed_within_an_interval_equals_one_unbroken_process(
    world_size: int, cases: list[tuple[str, str]]
) -> None:
    by_rank = run_on_ranks(world_size, _broken_runs, world_size, cases)
    for case in by_rank[0]:
        tolerance = 1e-5 if case[1] == "dct_adamw" else 1e-9  # error feedback in float32
        for weights, learned, keys, traffic in (runs[case] for runs in by_rank):
            for name, expected in _unbroken(case[1]).items():
                difference = float((weights[name] - expected).abs().max())
                assert difference <= tolerance, f"{case}, {name}: off by {difference}"
            assert keys == by_rank[0][case][2]
            assert len(learned) == 5  # q, few, wide, square, one
            for own, first in zip(learned, by_rank[0][case][1], strict=True):
                assert torch.equal(own, first)
                torch.testing.assert_close(own @ own.T, torch.eye(len(own), dtype=own.dtype))
            assert len(traffic) >= 5
            for predicted, sent in traffic:
                assert sorted(predicted) == sorted(sent), case  # two waves at a time


def _pieces(rank: int, strategy: str, world_size: int) -> tuple[dict[str, Tensor], list[tuple[Any, Any]]]:
    """Stacks, fused weights and convolutions; `test_pieces` has them as columns of a fixed dictionary."""
    with mock.patch.dict(
        test_pieces.OPTIONS, {"dictionary": "shared", "dictionary_interval": 4, "refresh_interval": 2}
    ):
        model, updater = test_pieces.build(strategy, world_size, "dct_adamw", rank)
    traffic = []
    for step in range(1, 10):
        predicted = collectives_of_step(updater, refresh=step % 2 == 0, dictionaries=step % 4 == 0)
        with CountCollectives() as counter:
            test_pieces.feed(model, updater, strategy, world_size, rank, range(step, step + 1))
        traffic.append(([(NAMES[each.operation], each.elements) for each in predicted], counter.calls))
    return test_pieces.weights_of(model, strategy, world_size), traffic[1:]


@pytest.mark.parametrize(("strategy", "world_size"), [("fsdp", 2), ("fsdp_last", 3), ("flat", 3)])
def test_matrices_of_stacks_and_fused_weights_share_one_dictionary_under_every_sharding(
    strategy: str, world_size: int
) -> None:
    expected, _ = _pieces(0, "ddp", 1)
    for weights, traffic in run_on_ranks(world_size, _pieces, strategy, world_size):
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], atol=1e-10, rtol=0, msg=name)
        for predicted, sent in traffic:
            assert predicted == sent
