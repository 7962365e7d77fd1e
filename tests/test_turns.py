"""While the collectives of one wave are under way another computes, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from sharded_models import OPTIMIZERS, SHAPES, Model, shard
from test_sharded_trajectories import assert_same_weights, one_process, trajectory
from test_transient_memory import stand_for
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_lowrank.dictionaries import DictionaryCache
from dist_lowrank.optim import DCTAdamW, Muon, engine
from dist_lowrank.optim.transient import held_bytes, sent_bytes
from dist_lowrank.optim.wave import LEAST_SENT_BYTES, Job, count_steps, cut_waves, update_wave
from dist_lowrank.sharding.turns import Activity, finish, take_turns


class _TellsWhen(TorchDispatchMode):
    """Sets a key of the store when an operation was called for the nth time."""

    def __init__(self, operation: str, times: int) -> None:
        super().__init__()
        self.operation, self.left = operation, times

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name == self.operation:
            self.left -= 1
            if self.left == 0:
                dist.distributed_c10d._get_default_store().set("told", "")
        return result


def _second_rank_comes_late(rank: int, strategy: str, workspace_bytes: int, operation: str, times: int) -> None:
    """The first rank's first sum cannot end before the second rank begins, and that waits for what comes after it."""
    model = Model(SHAPES, torch.float32)
    shard(model, strategy, 2, 0.5)
    updater = DCTAdamW(model.named_parameters(), rank=0.5, workspace_bytes=workspace_bytes, agree_on_gradients=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    updater._check_before_step([bound for members in updater.bind() for bound in members])  # compares replicas, once
    if rank == 1:
        dist.distributed_c10d._get_default_store().wait(["told"])
        updater.step()
    else:
        with _TellsWhen(operation, times):
            updater.step()


@pytest.mark.parametrize(
    ("strategy", "workspace_bytes", "operation", "times"),
    [
        ("ddp", 1500, "c10d::allreduce_", 2),  # the sums of the second wave
        ("fsdp", 2**20, "aten::_fused_adamw_", 1),  # the only wave, and the dense parameters
    ],
)
def test_a_collective_is_under_way_while_what_comes_next_is_computed(
    strategy: str, workspace_bytes: int, operation: str, times: int
) -> None:
    run_on_ranks(2, _second_rank_comes_late, strategy, workspace_bytes, operation, times, timeout_seconds=30)


def _one_by_one(activities: Iterable[Activity], workspace_bytes: int) -> None:
    for activity in activities:
        finish(activity.turns)


def _both(rank: int, strategy: str, world_size: int, optimizer: str, workspace_bytes: int) -> Any:
    """Weights with waves that take turns, and one by one; and how often two of the first step fit the workspace."""
    counts = []

    def counting(activities: Iterable[Activity], limit_bytes: int) -> None:
        activities = list(activities)
        held = [activity.held_bytes for activity in activities]
        counts.append(sum(min(pair) > 0 and sum(pair) <= limit_bytes for pair in pairwise(held)))
        take_turns(activities, limit_bytes)

    make, options = OPTIMIZERS[optimizer]
    several = {optimizer: (make, {**options, "workspace_bytes": workspace_bytes})}
    found = []
    for how in (counting, _one_by_one):
        with mock.patch.object(engine, "take_turns", how), mock.patch.dict(OPTIMIZERS, several):
            found.append(trajectory(rank, strategy, world_size, optimizer, torch.float64)[0])
    return *found, counts[0]


@pytest.mark.parametrize(
    ("strategy", "world_size", "optimizer", "workspace_bytes"),
    [
        ("ddp", 2, "dct_adamw", 1600),
        ("fsdp", 4, "trion", 1600),
        ("fsdp_rows", 4, "dct_adamw_every_third", 2000),
        ("flat", 4, "trion", 1600),
    ],
)
def test_waves_that_take_turns_equal_one_process_and_to_the_bit_waves_one_by_one(
    strategy: str, world_size: int, optimizer: str, workspace_bytes: int
) -> None:
    """Uneven and empty shards among them."""
    expected, _ = one_process(optimizer, torch.float64)
    for in_turns, one_by_one, pairs in run_on_ranks(
        world_size, _both, strategy, world_size, optimizer, workspace_bytes
    ):
        assert pairs
        assert_same_weights(in_turns, expected, 1e-10)
        assert_same_weights(in_turns, one_by_one, 0.0)


def _fails(rank: int) -> None:
    """Another wave fails, on this rank before the others have come to the sum that is under way."""
    ones = torch.ones(3)

    def sums() -> Any:
        yield [dist.all_reduce(ones, async_op=True)]

    def raises() -> Any:
        yield from ()
        if rank == 1:
            dist.distributed_c10d._get_default_store().wait(["failed"])
        else:
            dist.distributed_c10d._get_default_store().set("failed", "")
        raise ValueError("of the second")

    with pytest.raises(ValueError, match="of the second"):
        take_turns([Activity(sums(), lambda: 1), Activity(raises(), lambda: 1)], 2)
    assert ones.tolist() == [2.0] * 3  # over: nothing is written to it behind our back
    again = torch.full((2,), rank)
    dist.all_reduce(again)
    assert again.tolist() == [1, 1]


def test_an_error_waits_for_what_is_under_way_and_leaves_the_group_usable() -> None:
    run_on_ranks(2, _fails)


def test_what_does_not_fit_beside_another_waits_for_its_end() -> None:
    order = []

    def activity(name: str, turns: int) -> Any:
        for turn in range(turns):
            order.append(f"{name}{turn}")
            yield []

    sizes = {"a": 6, "b": 4, "c": 7, "d": math.inf, "e": 0}
    take_turns([Activity(activity(name, 2), partial(sizes.get, name)) for name in sizes], 10)
    assert order == ["a0", "b0", "a1", "b1", "c0", "c1", "d0", "e0", "d1", "e1"]


def _jobs(updater: Any) -> list[Job]:
    (members,) = updater.bind()
    return [job for bound in members for job in updater.jobs(updater.recipe(updater.param_groups[0]), bound)]


def _cuts(rank: int) -> None:
    stand_for(rank, 2)
    square = [nn.Parameter(torch.empty(1024, 1024)) for _ in range(16)]
    coefficients = DCTAdamW(square, rank=0.5, workspace_bytes=2**30)  # 512 x 512 numbers of each, 1 MiB
    waves = list(cut_waves(_jobs(coefficients), 2**30))
    assert [len(wave) for wave in waves] == [4, 4, 4, 4]
    assert all(sum(sent_bytes(*job) for job in wave) >= LEAST_SENT_BYTES for wave in waves)
    (small,) = cut_waves(_jobs(DCTAdamW(square[:7], rank=0.5)), 2**30)  # not enough for two
    assert len(small) == 7
    whole = [len(wave) for wave in cut_waves(_jobs(Muon(square[:8])), 2**30)]
    assert whole == [4, 4]  # two for each owner
    owned = _jobs(Muon(square))
    for fitting in (5, 7, 16):  # matrices in the workspace; only of the last do two waves take turns
        assert [len(wave) for wave in cut_waves(owned, fitting * held_bytes(*owned[0]))] == [4] * 4
    mesh = init_device_mesh("cpu", (2,))
    sharded = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=None)) for p in square]
    (aligned,) = cut_waves(_jobs(DCTAdamW(sharded, rank=0.5)), 2**30)  # sums of 4 KiB
    assert len(aligned) == 16


def test_waves_are_cut_for_overlap_only_where_they_send_much() -> None:
    run_on_ranks(1, _cuts, distributed=False)


def _divided(rank: int) -> None:
    """The first rank has both matrices of a stack of two ranks by two, or all ranks have both."""
    stand_for(rank, 4)
    mesh = init_device_mesh("cpu", (2, 2))
    for placements, turns in (((Shard(0), Shard(1)), 0), ((Replicate(), Shard(1)), 1)):
        stack = nn.Parameter(distribute_tensor(torch.randn(2, 8, 6), mesh, placements, src_data_rank=None))
        updater = DCTAdamW([{"params": [stack], "higher_dims": "stack"}], rank=2)
        stack.grad = torch.ones_like(stack)
        count_steps(_jobs(updater), updater.state)
        with torch.no_grad():
            activity = update_wave(_jobs(updater), updater.state, DictionaryCache())
            assert len(list(activity.turns)) == turns


def test_ranks_with_different_matrices_of_a_stack_do_not_take_turns() -> None:
    run_on_ranks(1, _divided, distributed=False)
