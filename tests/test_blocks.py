"""FRUGAL's blocks: who has turns, what memory they take, and that saved state continues in the middle of a turn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import run_on_ranks
from sharded_models import SHAPES, Model, full, gradients, placed_as, shard
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from dist_lowrank.optim import Frugal, full_state_dict
from dist_lowrank.optim.blocks import Blocks
from dist_lowrank.sharding.layouts import local

OPTIONS: dict[str, Any] = {"lr": 0.01, "rank": 2, "subspace": "blocks", "refresh_interval": 3}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2]


def _turns(order: str, count: int, fraction: float, steps: int) -> list[list[int]]:
    """By turn of three steps: whose it is."""
    recipe = Frugal([nn.Parameter(torch.ones(2, 2))], **{**OPTIONS, "rank": fraction, "block_order": order}).recipe
    options = Frugal([nn.Parameter(torch.ones(2, 2))], **{**OPTIONS, "rank": fraction, "block_order": order}).defaults
    blocks = [recipe(options).at(position, count) for position in range(count)]
    assert all(isinstance(each, Blocks) for each in blocks)
    by_step = [[p for p in range(count) if blocks[p].active(step)] for step in range(1, steps + 1)]
    assert by_step[::3] == by_step[1::3] == by_step[2::3]
    return by_step[::3]


def test_matrices_take_turns_in_the_order_that_is_asked_for() -> None:
    assert _turns("ascending", 5, 0.4, 12) == [[0, 1], [2, 3], [0, 4], [1, 2]]
    assert _turns("descending", 5, 0.4, 12) == [[3, 4], [1, 2], [0, 4], [2, 3]]
    assert _turns("mirror", 5, 2, 21) == [[0, 1], [2, 3], [3, 4], [3, 4], [2, 3], [0, 1], [0, 1]]
    assert _turns("random", 5, 1.0, 3) == [[0, 1, 2, 3, 4]]
    drawn = _turns("random", 5, 0.4, 900)
    assert all(len(turn) == 2 for turn in drawn)
    assert all(90 < sum(position in turn for turn in drawn) < 150 for position in range(5))


def _train(model: nn.Module, updater: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last + 1):
        for name, gradient in gradients(step, SHAPES, torch.float64).items():
            parameter = model.get_parameter(name)
            parameter.grad = placed_as(parameter, gradient)
        updater.step()


def _held(model: nn.Module, updater: Any) -> tuple[int, int]:
    """Bytes of moments that are held, and those of the two largest matrices."""
    parts = sorted(16 * local(model.get_parameter(name).detach()).numel() for name in MATRICES)
    return updater.memory_bytes()["moments"], sum(parts[-2:]) + 16 * len(MATRICES)


def test_only_matrices_whose_turn_it_is_hold_moments() -> None:
    model = Model(SHAPES, torch.float64)
    updater = Frugal(model.named_parameters(), **OPTIONS)
    assert updater.memory_bytes()["moments"] <= 16 * len(MATRICES)  # one element of each
    for step in range(1, 13):
        _train(model, updater, step, step)
        held, allowed = _held(model, updater)
        assert 16 * len(MATRICES) < held <= allowed


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_state_saved_within_a_turn_continues_to_the_bit(used: bool) -> None:
    models = [Model(SHAPES, torch.float64) for _ in range(2)]
    first, second = (Frugal(model.named_parameters(), **OPTIONS) for model in models)
    _train(models[0], first, 1, 5)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    full_bytes = sum(16 * models[0].get_parameter(name).numel() for name in MATRICES)
    assert file.tell() < 20_000 + full_bytes
    file.seek(0)
    models[1].load_state_dict(models[0].state_dict())
    if used:  # with other matrices awake
        _train(models[1], second, 1, 8)
        models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(torch.load(file))
    _train(models[0], first, 6, 10)
    _train(models[1], second, 6, 10)
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, other)
    assert first.memory_bytes() == second.memory_bytes()


def _sharded(rank: int, folder: str, strategy: str, world_size: int, resume: bool) -> tuple[dict[str, Tensor], Any]:
    model = Model(SHAPES, torch.float64)
    shard(model, strategy, world_size, 1.0)  # wide matrices by columns
    updater = Frugal(model.named_parameters(), **OPTIONS)
    if resume:
        state = {
            "optimizer": get_optimizer_state_dict(model, updater),
            "weights": {name: full(p) for name, p in model.named_parameters()},
        }
        dcp.load(state, checkpoint_id=folder)
        set_optimizer_state_dict(model, updater, state["optimizer"])
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(placed_as(p, state["weights"][name]))
    else:
        _train(model, updater, 1, 5)
        weights = {name: full(p) for name, p in model.named_parameters()}
        dcp.save({"optimizer": get_optimizer_state_dict(model, updater), "weights": weights}, checkpoint_id=folder)
    whole = full_state_dict(updater)
    _train(model, updater, 6, 10)
    held, allowed = _held(model, updater)
    assert held <= allowed
    return {name: full(p) for name, p in model.named_parameters()}, whole


@pytest.mark.parametrize(("strategy", "world_size"), [("fsdp", 2), pytest.param("ddp", 3, marks=pytest.mark.slow)])
def test_a_torch_checkpoint_within_a_turn_continues_on_fewer_ranks(
    tmp_path: Path, strategy: str, world_size: int
) -> None:
    expected, whole = run_on_ranks(4, _sharded, str(tmp_path), "fsdp", 4, False)[0]
    for found, again in run_on_ranks(world_size, _sharded, str(tmp_path), strategy, world_size, True):
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, atol=1e-10, rtol=0)
        for index, state in whole["state"].items():
            for key, tensor in state.items():
                assert torch.equal(again["state"][index][key], tensor)


def test_stacks_are_refused_since_their_matrices_share_state() -> None:
    stack = {"params": [nn.Parameter(torch.ones(2, 4, 4))], "higher_dims": "stack"}
    with pytest.raises(ValueError, match="higher_dims: 'stack' is not allowed; allowed: dense, flatten with subspace"):
        Frugal([stack], **OPTIONS)
