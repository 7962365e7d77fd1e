"""What our binding to DeepSpeed does not find as it expects is refused, on every rank, with what to do."""

from __future__ import annotations

import re
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed_runs import (
    SHAPES,
    Model,
    configuration,
    feed,
    gradients_of,
    set_environment,
    start,
)
from processes import run_on_ranks

from dist_lowrank.sharding.layouts import LayoutError
from dist_lowrank.strategies.deepspeed import bind


def _unbound(rank: int, config: dict[str, Any]) -> str:
    engine = start(config)
    with pytest.raises(RuntimeError) as caught:
        feed(engine, gradients_of(1)[0])
    return str(caught.value)


@pytest.mark.parametrize(("stage", "bf16"), [(0, True), (1, False), (1, True), (2, False), (3, False), (3, True)])
def test_a_step_without_bind_is_refused_with_the_line_that_is_missing(stage: int, bf16: bool) -> None:
    for message in run_on_ranks(2, _unbound, configuration(stage, bf16=bf16)):
        assert "dist_lowrank.strategies.deepspeed.bind(engine)" in message


def _shift_in_buffer(engine: Any) -> None:
    """The weight is said to lie one element further on, in the place of its neighbour's first."""
    weight = engine.module.weights["tall"].weight
    (flat, _) = engine.optimizer.bit16_groups_flat
    weight.data = flat[1 : 1 + weight.numel()].view(weight.shape)


def _swap_in_buffer(engine: Any) -> None:
    """Two weights of one size have changed places."""
    first, second = (engine.module.weights[name].weight for name in ("square", "same"))
    first.data, second.data = second.data, first.data


def _shift_on_one_rank(engine: Any) -> None:
    """The fp32 part is not the part of this rank."""
    if torch.distributed.get_rank() == 1:
        engine.optimizer.single_partition_of_fp32_groups[0].data.copy_(
            engine.optimizer.single_partition_of_fp32_groups[0].data.roll(1)
        )


def _shift_position(engine: Any) -> None:
    engine.optimizer.grad_position[engine.optimizer.get_param_id(engine.module.weights["wide"].weight)][1] += 1


def _reverse_groups(engine: Any) -> None:
    engine.basic_optimizer.param_groups.reverse()


def _one_bit(engine: Any) -> None:
    """The least difference there can be, on one rank, in a parameter of zeros."""
    if torch.distributed.get_rank() == 1:
        engine.optimizer.fp32_partitioned_groups_flat[0].data.view(torch.int32)[0] += 1


def _fourth_class(engine: Any) -> None:
    engine.optimizer.__class__ = type("ZenFlowZeroOptimizer", (type(engine.optimizer),), {})


def _parameter_without_buffer(engine: Any) -> None:
    """A part of the buffer that no parameter claims."""
    engine.optimizer.round_robin_bit16_groups[0].pop(1)


def _swapped_to_disk(engine: Any) -> None:
    engine.optimizer.swap_optimizer = True


def _parameters_on_the_host(engine: Any) -> None:
    engine.optimizer.offload_param = True


PLANTED: dict[str, tuple[int, Any, str]] = {
    "a wrong place in the buffer": (
        1,
        _shift_in_buffer,
        "does not lie in the buffer of its group, behind those before it",
    ),
    "two weights swapped": (2, _swap_in_buffer, "does not lie in the buffer of its group, behind those before it"),
    "a part shifted on one rank": (2, _shift_on_one_rank, "rank 1: elements .* are not elements"),
    "a wrong offset": (3, _shift_position, "'weights.wide.weight' is said to begin at element"),
    "reordered groups": (1, _reverse_groups, "parameter groups are not DeepSpeed's"),
    "reordered groups of stage 3": (3, _reverse_groups, "is not in the group that DeepSpeed takes"),
    "one bit": (3, _one_bit, "rank 1: elements 0 to .* are not elements"),
    "an unknown wrapper": (2, _fourth_class, "the wrapper ZenFlowZeroOptimizer is not known; allowed: DeepSpeedZero"),
    "an unclaimed parameter": (1, _parameter_without_buffer, "belong to no parameter, and are no padding"),
    "swapping to NVMe": (3, _swapped_to_disk, "to NVMe is not covered.* allowed: cpu, none"),
    "parameters offloaded": (3, _parameters_on_the_host, "offload_param is not covered; allowed: none"),
}


def _bind_refused(rank: int, config: dict[str, Any], plant: Any) -> str:
    engine = start(config, model=Model({**SHAPES, "same": SHAPES["square"]}))
    plant(engine)
    with pytest.raises(LayoutError) as caught:
        bind(engine)
    return str(caught.value)


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_not_as_expected_is_refused_on_every_rank(planted: str) -> None:
    stage, plant, message = PLANTED[planted]
    for found in run_on_ranks(2, _bind_refused, configuration(stage), plant):
        assert re.search(message, found), found


def _with_section(rank: int, config: dict[str, Any]) -> str:
    return _bind_refused(rank, config, lambda engine: None)


def test_an_optimizer_section_in_the_configuration_of_deepspeed_is_refused() -> None:
    config = configuration(2, optimizer={"type": "AdamW", "params": {"lr": 1.0, "torch_adam": True}})
    for message in run_on_ranks(2, _with_section, config):
        assert re.search(r"section `optimizer` \(adamw\); allowed: none, and an optimizer of dist_lowrank", message)


def _foreign_optimizer(rank: int) -> str:
    set_environment()
    model = Model()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=configuration(1)
    )
    with pytest.raises(LayoutError) as caught:
        bind(engine)
    return str(caught.value)


def test_an_optimizer_of_someone_else_is_told_that_it_needs_no_bind() -> None:
    for message in run_on_ranks(2, _foreign_optimizer):
        assert "the engine's optimizer is AdamW, which needs no bind()" in message
