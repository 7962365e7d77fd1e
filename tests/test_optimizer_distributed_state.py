"""State that is saved, re-sharded, swapped or misplaced: continued exactly or refused, never silently wrong."""

from __future__ import annotations

import copy
import io
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import run_on_ranks
from test_sharded_trajectories import OPTIMIZERS, SHAPES, Model, full, gradients, shard
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from dist_lowrank.optim import DCTAdamW, Dion, Dion3, Muon, full_state_dict


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last + 1):
        for name, gradient in gradients(step, SHAPES, torch.float64).items():
            parameter = model.get_parameter(name)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = gradient
        optimizer.step()


WHOLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "muon": (Muon, {"lr": 0.01}),
    "dion": (Dion, {"lr": 0.01, "rank": 0.5}),
    "dion3": (Dion3, {"lr": 0.01, "rank": 0.5}),
}
# Where these are cut otherwise than they were saved.
RESUMED = [
    *product(["dct_adamw_feedback", "trion"], [("fsdp", 4), ("fsdp", 2), ("fsdp", 1), ("fsdp_rows", 3)], [False, True]),
    *product(WHOLE, [("fsdp_rows", 3)], [False]),
]


def build(strategy: str, world_size: int, optimizer: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    make, options = (OPTIMIZERS | WHOLE)[optimizer]
    model = Model(SHAPES, torch.float64)
    shard(model, strategy, world_size, options.get("rank", 0.5))
    return model, make(model.named_parameters(), **options)


def _save(rank: int, folder: str, strategy: str, optimizer: str, flatten: bool) -> dict[str, Tensor]:
    model, updater = build(strategy, 4, optimizer)
    train(model, updater, 1, 4)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = get_optimizer_state_dict(model, updater, options=options)
    weights = {name: full(p) for name, p in model.named_parameters()}
    dcp.save({"optimizer": state, "weights": weights}, checkpoint_id=folder)
    train(model, updater, 5, 8)
    return {name: full(p) for name, p in model.named_parameters()}


def _resume(rank: int, folder: str, strategy: str, world_size: int, optimizer: str, flatten: bool) -> dict[str, Tensor]:
    model, updater = build(strategy, world_size, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = {
        "optimizer": get_optimizer_state_dict(model, updater, options=options),
        "weights": {name: full(p) for name, p in model.named_parameters()},
    }
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, updater, state["optimizer"], options=options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = state["weights"][name]
            if isinstance(p, DTensor):
                value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
            p.copy_(value)
    for parameter in model.parameters():
        indices = updater.state[parameter].get("indices")
        assert indices is None or indices.dtype == torch.int8
    train(model, updater, 5, 8)
    return {name: full(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("strategy", "world_size", "optimizer", "flatten"),
    [
        pytest.param(
            *ranks,
            name,
            flatten,
            id=f"{'-'.join(map(str, ranks))}-{name}-{'flat' if flatten else 'nested'}",
            marks=pytest.mark.slow if name in ("muon", "dion") else (),
        )
        for name, ranks, flatten in RESUMED
    ],
)
def test_a_torch_checkpoint_saved_on_4_ranks_continues_on_fewer(
    tmp_path: Path, strategy: str, world_size: int, optimizer: str, flatten: bool
) -> None:
    expected = run_on_ranks(4, _save, str(tmp_path), "fsdp", optimizer, flatten)[0]
    for found in run_on_ranks(world_size, _resume, str(tmp_path), strategy, world_size, optimizer, flatten):
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, atol=1e-8, rtol=0)


def _first_look(rank: int) -> bool:
    model, updater = build("fsdp", 2, "dct_adamw")
    get_optimizer_state_dict(model, updater)  # torch would run a step on zero gradients to fill an empty state
    return all(not value.any() for state in updater.state.values() for value in map(full, state.values()))


def test_saving_before_the_first_step_does_not_step() -> None:
    assert run_on_ranks(2, _first_look) == [True, True]


def _rank_zero_file(rank: int, folder: str) -> str:
    model = Model({"even.weight": (8, 4)}, torch.float32)
    updater = DCTAdamW(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    updater.step()
    if rank == 0:
        torch.save(updater.state_dict(), f"{folder}/state.pt")
    dist.barrier()
    updater.load_state_dict(torch.load(f"{folder}/state.pt", weights_only=False))
    with pytest.raises(RuntimeError) as caught:
        updater.step()
    return str(caught.value)


def test_the_part_of_one_rank_loaded_on_all_is_refused(tmp_path: Path) -> None:
    for message in run_on_ranks(2, _rank_zero_file, str(tmp_path)):
        assert "ranks [0, 1] have loaded the same rows" in message
        assert "full_state_dict" in message


def _partial_gradients(rank: int) -> dict[str, Tensor]:
    """Replicated DTensor weights, whose gradients are still to be summed over the ranks."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    weights = {"matrix": torch.randn(6, 4), "vector": torch.randn(4)}
    parameters = {
        name: nn.Parameter(distribute_tensor(w, mesh, [Replicate()], src_data_rank=None)) for name, w in weights.items()
    }
    updater = DCTAdamW(list(parameters.items()))
    for name, parameter in parameters.items():
        own = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(rank))
        parameter.grad = DTensor.from_local(own, mesh, [Partial()])
    updater.step()
    return {name: p.detach().to_local().clone() for name, p in parameters.items()}


def test_gradients_that_are_partial_sums_are_summed_first() -> None:
    first, second = run_on_ranks(2, _partial_gradients)
    torch.manual_seed(0)
    weights = {"matrix": nn.Parameter(torch.randn(6, 4)), "vector": nn.Parameter(torch.randn(4))}
    updater = DCTAdamW(list(weights.items()))
    for weight in weights.values():
        weight.grad = sum(torch.randn(weight.shape, generator=torch.Generator().manual_seed(r)) for r in range(2))
    updater.step()
    for name, weight in weights.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight.detach(), atol=1e-6, rtol=0)


def _subgroup_copy(rank: int) -> list[Any]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(rank // 2)
    parameter = nn.Parameter(torch.randn(8, 4))
    updater = DCTAdamW([parameter], process_group=groups[rank // 2], workspace_bytes=12345)
    parameter.grad = torch.randn(8, 4)
    updater.step()
    copied = copy.deepcopy(updater)
    (twin,) = copied.param_groups[0]["params"]
    parameter.grad = twin.grad = torch.ones(8, 4)
    updater.step()
    copied.step()
    return [torch.equal(parameter, twin), copied.workspace_bytes, copied.process_group is groups[rank // 2]]


def test_a_copy_keeps_its_process_group_and_follows_the_same_trajectory() -> None:
    assert run_on_ranks(4, _subgroup_copy) == [[True, 12345, True]] * 4


def _outsider(rank: int) -> str:
    group = dist.new_group([0])
    if rank == 0:
        return ""
    with pytest.raises(ValueError, match="process_group") as caught:
        DCTAdamW([nn.Parameter(torch.ones(2, 2))], process_group=group)
    return str(caught.value)


def test_a_rank_outside_the_process_group_is_told_so() -> None:
    assert "not in it" in run_on_ranks(2, _outsider)[1]


def test_a_parameter_swapped_after_a_look_at_the_state_is_trained() -> None:
    old, new = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    updater = DCTAdamW([old])
    updater.load_state_dict(updater.state_dict())
    updater.param_groups[0]["params"] = [new]
    new.grad = torch.ones(4, 3)
    updater.step()
    assert not torch.equal(new, torch.ones(4, 3))
    assert set(updater.state_dict()["state"]) == {0}  # the old parameter's state is gone


@pytest.mark.parametrize("reset", ["clear", "assign", "one"])
def test_a_state_that_was_emptied_is_made_anew(reset: str) -> None:
    parameter = nn.Parameter(torch.ones(4, 3))
    updater = DCTAdamW([parameter])
    parameter.grad = torch.ones(4, 3)
    updater.step()
    if reset == "clear":
        updater.state.clear()
    elif reset == "assign":
        updater.state = {}
    else:
        updater.state[parameter] = {}
    updater.step()
    assert updater.state[parameter]["step"] == 1


def test_frozen_parameters_have_no_state_until_they_are_trained() -> None:
    frozen, trained = nn.Parameter(torch.ones(4, 3), requires_grad=False), nn.Parameter(torch.ones(4, 3))
    updater = DCTAdamW([frozen, trained])
    trained.grad = torch.ones(4, 3)
    updater.step()
    assert set(updater.state_dict()["state"]) == {1}
    updater.load_state_dict(updater.state_dict())
    frozen.requires_grad_()
    frozen.grad = torch.ones(4, 3)
    updater.step()
    assert (updater.state[frozen]["step"], updater.state[trained]["step"]) == (1, 2)


def test_a_step_inside_autocast_is_the_same_step() -> None:
    weights = []
    for enabled in (False, True):
        parameter = nn.Parameter(torch.ones(8, 6))
        updater = DCTAdamW([parameter], error_feedback="fp32")
        parameter.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            updater.step()
        weights.append(parameter.detach())
    assert torch.equal(*weights)


def test_options_that_shape_the_state_cannot_change_after_it_exists() -> None:
    parameter = nn.Parameter(torch.ones(8, 6))
    updater = DCTAdamW([parameter], rank=2)
    parameter.grad = torch.ones(8, 6)
    updater.step()
    updater.param_groups[0]["rank"] = 3
    with pytest.raises(ValueError, match="rank"):
        updater.step()


def test_a_gathered_state_is_a_snapshot() -> None:
    parameter = nn.Parameter(torch.ones(8, 6))
    updater = DCTAdamW([parameter])
    parameter.grad = torch.ones(8, 6)
    updater.step()
    gathered = full_state_dict(updater)
    buffer = io.BytesIO()
    torch.save(gathered, buffer)
    updater.step()
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    for key, value in saved["state"][0].items():
        assert torch.equal(gathered["state"][0][key], value)
