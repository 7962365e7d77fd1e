"""accelerate replaces parameters when the optimizer has state already: the new are trained, the old are freed."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin  # before the fork, for all ranks
from accelerate.utils.fsdp_utils import load_fsdp_optimizer, save_fsdp_optimizer
from processes import run_on_ranks
from torch import nn
from torch.distributed.tensor import DTensor

from dist_lowrank.optim import DCTAdamW
from dist_lowrank.sharding.layouts import local


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(4, 9, bias=False))


def _losses(model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Any = None) -> list[float]:
    losses = []
    for step in range(6):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        loss = model(inputs).square().mean()
        if accelerator is None:
            loss.backward()
        else:
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _fsdp2_accelerator(rank: int, world_size: int, **options: Any) -> Accelerator:
    """With which accelerate itself prepares for FSDP2, on a CPU.

    accelerate looks at an FSDP plugin on GPUs only; the two attributes that it would set there are set here.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def _under_fsdp2(rank: int, world_size: int, only_rank_zero_loads: bool) -> dict[str, Any]:
    accelerator = _fsdp2_accelerator(rank, world_size, cpu_ram_efficient_loading=only_rank_zero_loads)

    model = _model()
    if only_rank_zero_loads and rank > 0:
        nn.utils.vector_to_parameters(torch.full((150,), 7.0), model.parameters())  # whatever happens to be in memory
    optimizer = DCTAdamW(model.named_parameters(), lr=0.1, rank=0.5)
    originals = [weakref.ref(parameter) for parameter in model.parameters()]
    model, prepared = accelerator.prepare(model, optimizer)
    parameters = list(model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    losses = _losses(model, prepared, accelerator)
    gc.collect()
    return {
        "losses": losses,
        "originals alive": sum(original() is not None for original in originals),
        "state is of the parameters": {id(p) for p in optimizer.state} == {id(p) for p in parameters},
    }


@pytest.mark.parametrize("only_rank_zero_loads", [False, True], ids=["all ranks load", "rank 0 loads"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parameters_that_accelerate_replaces_for_fsdp2_train_as_in_one_process(
    world_size: int, only_rank_zero_loads: bool
) -> None:
    model = _model()
    expected = _losses(model, DCTAdamW(model.named_parameters(), lr=0.1, rank=0.5))
    for found in run_on_ranks(world_size, _under_fsdp2, world_size, only_rank_zero_loads):
        assert found["losses"] == pytest.approx(expected, rel=1e-5)
        assert found["originals alive"] == 0
        assert found["state is of the parameters"]


def _saved_and_loaded(rank: int, world_size: int, folder: str, kind: str) -> list[bool]:
    accelerator = _fsdp2_accelerator(rank, world_size, state_dict_type=kind)
    model = _model()
    model, optimizer = accelerator.prepare(model, DCTAdamW(model.named_parameters(), lr=0.1, rank=0.5))
    _losses(model, optimizer, accelerator)
    save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, folder)
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    _losses(model, optimizer, accelerator)
    load_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, folder)
    loaded = optimizer.state_dict()["state"]
    return [
        loaded[index][key].dtype == value.dtype and torch.equal(local(loaded[index][key]), local(value))
        for index, state in kept.items()
        for key, value in state.items()
    ]


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_the_fsdp_checkpoints_of_accelerate_hold_the_whole_state(tmp_path: Path, kind: str) -> None:
    for equal in run_on_ranks(2, _saved_and_loaded, 2, str(tmp_path), kind):
        assert len(equal) > 10
        assert all(equal)


def test_stepping_with_one_group_at_a_time_keeps_the_state_of_the_others() -> None:
    parameters = [nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = DCTAdamW([{"params": [parameter]} for parameter in parameters])
    groups = optimizer.param_groups
    for _ in range(3):
        for parameter, group in zip(parameters, groups, strict=True):
            parameter.grad = torch.ones(4, 3)
            optimizer.param_groups = [group]
            optimizer.step()
    optimizer.param_groups = groups
    assert [int(optimizer.state[parameter]["step"]) for parameter in parameters] == [3, 3]
