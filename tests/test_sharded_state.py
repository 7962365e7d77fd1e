"""State under sharding: gathered whole, loaded back, and to the bit that of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import run_on_ranks
from sharded_models import LOW_BIT, OPTIMIZERS, SHAPES, STRATEGIES, Model, gradients, matrix_forms, placed_as, shard
from torch.distributed.tensor import DTensor

from dist_lowrank.optim import full_state_dict


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
            parameter.grad = placed_as(parameter, gradient)
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
