"""What cannot be updated exactly is refused, with the reason and the way out, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from processes import run_on_ranks
from support_matrix import OPTIMIZERS, supports
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import dist_lowrank.optim
from dist_lowrank.optim import DCTAdamW, param_groups
from dist_lowrank.sharding.layouts import LayoutError

# By class. What they refuse is the engine's doing, so one group of processes goes through them all.
NEEDED: dict[str, dict[str, Any]] = {"GoLore": {"switch_step": 9}}
EVERY: list[Callable[..., torch.optim.Optimizer]] = [
    partial(getattr(dist_lowrank.optim, name), **NEEDED.get(name, {})) for name in OPTIMIZERS
]


def message_of(updater: torch.optim.Optimizer, parameters: list[torch.Tensor], error: type[Exception]) -> str:
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(error) as caught:
        updater.step()
    for p, kept in zip(parameters, before, strict=True):
        assert torch.equal(
            p.to_local() if isinstance(p, DTensor) else p, kept.to_local() if isinstance(kept, DTensor) else kept
        )
    return str(caught.value)


def _with_every_optimizer(rank: int, refused: Callable[..., str], *arguments: Any) -> list[str]:
    return [refused(make, *arguments) for make in EVERY]


def on_every_rank(world_size: int, refused: Callable[..., str], *arguments: Any) -> list[str]:
    """What every optimizer says on every rank."""
    found = run_on_ranks(world_size, _with_every_optimizer, refused, *arguments)
    assert [len(messages) for messages in found] == [len(OPTIMIZERS)] * world_size
    return [message for messages in found for message in messages]


def _fsdp1(make: Any, use_orig_params: bool) -> str:
    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    updater = make(model.named_parameters())
    model(torch.ones(2, 8)).sum().backward()
    return message_of(updater, list(model.parameters()), LayoutError)


@supports(
    "refused",
    strategy="FSDP1",
    reason="no matrix can be told from its flattened parameters; use FSDP2, `torch.distributed.fsdp.fully_shard`",
)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused_and_fsdp2_named(use_orig_params: bool) -> None:
    for message in on_every_rank(2, _fsdp1, use_orig_params):
        assert "flattened by FSDP1" in message
        assert "allowed: FSDP2, `torch.distributed.fsdp.fully_shard`" in message


def _strided(make: Any) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["shard"])
    (parameter,) = model.parameters()
    assert "Strided" in str(parameter.placements) or parameter.placements == (Shard(0), Shard(0)), parameter.placements
    updater = make([("layer.weight", parameter)])
    parameter.grad = torch.ones_like(parameter)
    return message_of(updater, [parameter], LayoutError)


@supports(
    "refused",
    strategy="strided shards",
    reason="no rank holds a block of whole rows; `low_rank=False` updates such a parameter densely",
)
def test_strided_shards_are_refused_by_name() -> None:
    for message in on_every_rank(4, _strided):
        assert "'layer.weight'" in message
        assert "low_rank=False" in message


def _two_dimensions(make: Any) -> str:
    mesh = init_device_mesh("cpu", (2, 2))
    parameter = nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(0), Shard(1)]))
    updater = make([("layer.weight", parameter)])
    parameter.grad = torch.ones_like(parameter)
    message = message_of(updater, [parameter], LayoutError)
    dense = make([{"params": [("layer.weight", parameter)], "low_rank": False}])  # the way out that it names
    dense.step()
    return message


@supports(
    "refused",
    strategy="two sharded mesh dimensions",
    reason="no rank holds whole rows of either axis; `low_rank=False` updates such a parameter densely",
)
def test_shards_over_two_mesh_dimensions_are_refused_by_name() -> None:
    for message in on_every_rank(4, _two_dimensions):
        assert "'layer.weight' is sharded over 2 mesh dimensions" in message
        assert "low_rank=False" in message


def _stack_over_two_dimensions(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2, 2))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 8, 8), mesh, [Shard(0), Shard(0)]))
    updater = DCTAdamW([{"params": [("experts", parameter)], "higher_dims": "stack"}])
    parameter.grad = torch.ones_like(parameter)
    return message_of(updater, [parameter], LayoutError)


def test_a_stack_divided_over_two_mesh_dimensions_is_refused() -> None:
    for message in run_on_ranks(4, _stack_over_two_dimensions):
        assert "'experts'" in message
        assert "allowed: one" in message


def _hooks(make: Any, sharded: bool) -> str:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for name, p in list(model.named_parameters()):
            setattr(model, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()])))
    messages = []
    for p in model.parameters():
        updater = make([p])

        def layer_wise(_: torch.Tensor, updater: torch.optim.Optimizer = updater) -> None:
            messages.append(message_of(updater, list(model.parameters()), RuntimeError))

        p.register_post_accumulate_grad_hook(layer_wise)
    x = torch.ones(3, 6)
    if sharded:
        x = distribute_tensor(x, init_device_mesh("cpu", (2,)), [Replicate()])
    model(x).sum().backward()
    assert len(messages) == 2
    return messages[0]


@supports(
    "refused",
    strategy="layer-wise hooks",
    reason="where ranks share parameters they need not come there in the same order; step after backward (one process "
    "may step from hooks)",
)
@pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "dtensors"])
def test_layer_wise_hooks_are_refused_where_ranks_share_parameters(sharded: bool) -> None:
    for message in on_every_rank(2, _hooks, sharded):
        assert "called during backward, from a gradient hook" in message
        assert "allowed: step() after backward" in message


def _stepping(updater: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
    def hook(_: torch.Tensor) -> None:
        updater.step()

    return hook


def test_one_process_may_step_layer_by_layer_from_hooks() -> None:
    results = []
    for layer_wise in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
        if layer_wise:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(_stepping(DCTAdamW([p])))
            model(torch.ones(3, 6)).square().sum().backward()
        else:
            updater = DCTAdamW(param_groups(model))
            model(torch.ones(3, 6)).square().sum().backward()
            updater.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
