"""Gradients that are missing on some ranks or at some steps; parameters that are tied, frozen, late or of others."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collectives import CountCollectives
from processes import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dist_lowrank.optim import DCTAdamW, Trion
from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.layouts import chunk_range
from dist_lowrank.sharding.pieces import FlatPart

SHAPES = {"tall": (9, 4), "wide": (4, 10), "few": (2, 6), "vector": (7,)}
STEPS = 8
OPTIMIZERS: dict[str, Any] = {
    "dct_adamw": partial(DCTAdamW, lr=0.01, rank=0.5, refresh_interval=3),
    "trion": partial(Trion, lr=0.01, rank=0.5),
}


def value(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def missing(name: str, step: int, rank: int) -> bool:
    """Everywhere at step 1 for one and at step 4 for another parameter, and on some ranks at other steps."""
    if (name, step) in (("tall", 1), ("wide", 4), ("vector", 4)):
        return True
    return (step + rank + list(SHAPES).index(name)) % 3 == 0


def rows_of(shape: tuple[int, ...], world_size: int, rank: int) -> slice:
    return slice(*chunk_range(shape[0], world_size, rank))


def one_process(optimizer: str, world_size: int) -> dict[str, Tensor]:
    """Zeros stand where a rank's gradient is missing; a step is skipped where it is missing on all."""
    parameters = {name: nn.Parameter(value(name, 0)) for name in SHAPES}
    updater = OPTIMIZERS[optimizer](list(parameters.items()))
    for step in range(1, STEPS + 1):
        for name, p in parameters.items():
            absent = [rank for rank in range(world_size) if missing(name, step, rank)]
            p.grad = None if len(absent) == world_size else value(name, step)
            for rank in absent if p.grad is not None else []:
                p.grad[rows_of(SHAPES[name], world_size, rank)] = 0
        updater.step()
    return {name: p.detach() for name, p in parameters.items()}


def _sharded(rank: int, optimizer: str, world_size: int, flat: bool) -> dict[str, Tensor]:
    model = nn.ParameterDict({name: nn.Parameter(value(name, 0)) for name in SHAPES})
    if flat:
        parts = {}
        for name, shape in SHAPES.items():
            width = value(name, 0)[0].numel()
            ranges = [rows_of(shape, world_size, k) for k in range(world_size)]
            slices = tuple(FlatSlice(shape, each.start * width, each.stop * width) for each in ranges)
            model[name] = nn.Parameter(value(name, 0)[ranges[rank]].flatten())
            parts[model[name]] = [FlatPart(name, 0, slices)]
        updater = OPTIMIZERS[optimizer](list(model.items()))
        updater.declare_flat_parts(parts, dist.group.WORLD)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
        updater = OPTIMIZERS[optimizer](list(model.items()))
    for step in range(1, STEPS + 1):
        for name, p in model.items():
            gradient = value(name, step)
            if flat:
                gradient = gradient[rows_of(SHAPES[name], world_size, rank)].flatten()
            else:
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = None if missing(name, step, rank) else gradient
        updater.step()
    if not flat:
        return {name: p.full_tensor().detach() for name, p in model.items()}
    weights = {}
    for name, p in model.items():
        parts_by_rank: list[Any] = [None] * world_size
        dist.all_gather_object(parts_by_rank, p.detach())
        weights[name] = torch.cat(parts_by_rank).view(SHAPES[name])
    return weights


@pytest.mark.parametrize("flat", [False, True], ids=["fsdp", "flat"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_missing_on_some_ranks_counts_as_zero_there(optimizer: str, world_size: int, flat: bool) -> None:
    expected = one_process(optimizer, world_size)
    for found in run_on_ranks(world_size, _sharded, optimizer, world_size, flat):
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, atol=1e-10, rtol=0)


def _unequal_replicas(rank: int) -> str:
    parameters = [("first", nn.Parameter(torch.ones(4, 4))), ("second", nn.Parameter(torch.ones(4, 4)))]
    updater = DCTAdamW(parameters)
    parameters[0][1].grad = torch.ones(4, 4)
    if rank == 1:
        parameters[1][1].grad = torch.ones(4, 4)
    with pytest.raises(RuntimeError) as caught:
        updater.step()
    assert all(torch.equal(p, torch.ones(4, 4)) for _, p in parameters)  # nothing was updated
    return str(caught.value)


def test_a_gradient_missing_on_one_replica_is_refused_on_every_rank_by_name() -> None:
    for message in run_on_ranks(3, _unequal_replicas):
        assert "'second' has a gradient on some of the ranks" in message


def _votes(rank: int, agree: bool) -> list[tuple[str, int]]:
    model = nn.ParameterDict({name: nn.Parameter(value(name, 0)) for name in SHAPES})
    fully_shard(
        model, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda p: Shard(int(p.shape[0] < p.shape[-1]))
    )
    updater = DCTAdamW(list(model.items()), refresh_interval=2, agree_on_gradients=agree)
    for _ in range(3):
        for p in model.values():
            p.grad = torch.ones_like(p)
        with CountCollectives() as counter:
            updater.step()
    return counter.calls


@pytest.mark.parametrize(("agree", "calls"), [(True, [("allreduce_", len(SHAPES))]), (False, [])])
def test_agreeing_costs_one_byte_per_parameter_and_can_be_left_out(agree: bool, calls: list[tuple[str, int]]) -> None:
    assert run_on_ranks(2, _votes, agree) == [calls, calls]


class Tied(nn.Module):
    """Two layers with one weight, a frozen one, one that is trained from the third step on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(6, 7)
        self.frozen.requires_grad_(False)
        self.late = nn.Linear(7, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.late(torch.tanh(self.frozen(self.second(torch.tanh(self.first(x))))))


def _tied(rank: int, strategy: str, world_size: int) -> dict[str, Tensor]:
    model = Tied()
    wrapped: nn.Module = model
    if strategy == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    elif world_size > 1:
        wrapped = DistributedDataParallel(model)
    named = dict(model.named_parameters())
    assert "second.weight" not in named
    late = [(name, p) for name, p in named.items() if name.startswith("late")]
    adamw = DCTAdamW([(name, p) for name, p in named.items() if not name.startswith("late")], lr=0.01, rank=0.5)
    trion = Trion([late[1]], lr=0.01, rank=2)  # a second optimizer, of the late bias
    generator = torch.Generator().manual_seed(4)
    for step in range(6):
        if step == 2:
            trion.add_param_group({"params": [late[0]], "rank": 3})
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        wrapped(x).square().mean().backward()
        for optimizer in (adamw, trion):
            optimizer.step()
        model.zero_grad()
    assert not adamw.state.get(named["frozen.weight"])
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 3), ("fsdp", 4)])
def test_tied_frozen_and_late_parameters_of_two_optimizers_follow_one_process(strategy: str, world_size: int) -> None:
    expected = _tied(0, "ddp", 1)
    before = dict(Tied().named_parameters())
    assert torch.equal(expected["frozen.weight"], before["frozen.weight"])
    assert not torch.equal(expected["late.weight"], before["late.weight"])
    for found in run_on_ranks(world_size, _tied, strategy, world_size):
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, atol=1e-10, rtol=0)
