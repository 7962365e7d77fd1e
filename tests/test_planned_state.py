"""What a plan says of the optimizer's state is what an optimizer holds, to the byte, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from test_memory_table import RANKS, TABLE, configuration
from torch import nn

from dist_lowrank.config import RunConfig, compose
from dist_lowrank.planning.state import keeps_what_is_faster, optimizer_bytes
from dist_lowrank.planning.weights import weight_bytes
from dist_lowrank.strategies import apply_strategy
from dist_lowrank.telemetry.memory import memory_by_cause
from dist_lowrank.training.model import low_rank_forms, route
from dist_lowrank.training.optimizers import make_optimizer
from dist_lowrank.training.planned_parameters import planned_parameters
from dist_lowrank.training.traffic_forecast import optimizer_on_layouts, pretended_rank

# Rows that do not divide, fewer rows than ranks, left sides, and a dense path with less elements than ranks.
SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.q_proj.weight": (10, 6),
    "layers.0.down_proj.weight": (7, 5),
    "layers.1.few.weight": (3, 2),
    "layers.1.wide.weight": (5, 12),
    "layers.1.square.weight": (8, 8),
    "layers.1.one.weight": (1, 8),
    "embed_tokens.weight": (9, 4),
    "norm.weight": (6,),
    "bias.weight": (1,),
}
OPTIONS: dict[str, list[str]] = {
    "dct_adamw": ["optimizer.refresh_interval=2"],
    "feedback int4": ["optimizer.error_feedback=int4"],
    "moments int8": ["optimizer.moment_dtype=int8", "optimizer.error_feedback=int8"],
    "moments bf16": ["optimizer.moment_dtype=bf16", "optimizer.error_feedback=bf16", "optimizer.rank=0.5"],
    "ages": ["optimizer.column_bias_correction=true", "optimizer.rank=3"],
    "fft": ["optimizer.transform=fft", "optimizer.materialize=false", "optimizer.side=left"],
    "bf16 operands": ["optimizer.transform_precision=bf16"],
    "shared": ["optimizer.dictionary=shared"],
    "state of weights": ["optimizer.state_dtype=weights", "precision=bf16_weights"],
    "fp64": ["precision=fp64"],
    "trion": ["optimizer=trion"],
    "auto": ["optimizer.transform=auto"],
    "galore": ["optimizer=galore"],
    "golore": ["optimizer=golore", "optimizer.refresh_interval=1", "train.steps=3"],  # random from the second step on
    "galore2": ["optimizer=galore2"],
    "apollo": ["optimizer=apollo"],
    "fira": ["optimizer=fira"],
    "frugal": ["optimizer=frugal_published", "optimizer.refresh_interval=1"],
    "ldadam": ["optimizer=ldadam"],
    "subtrack": ["optimizer=subtrack"],
    "muon": ["optimizer=muon"],
    "dion": ["optimizer=dion", "optimizer.rank=0.2"],
    "dion3": ["optimizer=dion3"],
    "scale": ["optimizer=scale"],
    "adafactor": ["optimizer=adafactor"],
    "came": ["optimizer=came"],
    "smmf": ["optimizer=smmf"],
    "adamw8bit": ["optimizer=adamw8bit"],
    "adamw": ["optimizer=adamw"],
}
STRATEGIES = ("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
DTYPES = {"bf16_weights": torch.bfloat16, "fp64": torch.float64}


class Model(nn.Module):
    """Parameters alone."""

    def __init__(self, config: RunConfig, device: str) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            parent: Any = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            dtype = DTYPES.get(config.precision.name, torch.float32)
            setattr(parent, last, nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)))


@cache
def settings(options: str) -> RunConfig:
    return compose(OPTIONS[options])


def configured(options: str, strategy: str, world_size: int) -> RunConfig:
    config = settings(options)
    shard_size = (world_size + 1) // 2 if strategy == "hsdp" else None
    return replace(config, strategy=replace(config.strategy, name=strategy, shard_size=shard_size))


def planned(config: RunConfig, world_size: int, step: int | None = None) -> dict[str, Any]:
    parameters = planned_parameters(config, Model(config, "meta"))
    weights = {} if config.strategy.zero_stage else weight_bytes(config, parameters, world_size)
    return {**weights, **optimizer_bytes(config, parameters, world_size, step=step)}


def positive(by_cause: dict[str, Any], rank: int | None = None) -> dict[str, int]:
    found = {cause: int(count if rank is None else count[rank]) for cause, count in by_cause.items()}
    return {cause: count for cause, count in found.items() if count}


# Before a step there are no dictionaries, nothing to tell, and no turns.
_LATER = ("dictionary", "diagnostics")


def assert_bound_state_is_as_planned(options: str, strategies: Sequence[str], world_size: int, ranks: range) -> None:
    for strategy in strategies:
        config = configured(options, strategy, world_size)
        later = {*_LATER, "moments"} if options == "frugal" else {*_LATER}
        expected = planned(config, world_size)
        for rank in ranks:
            with pretended_rank(rank, world_size):
                held = optimizer_on_layouts(config, Model(config, "meta")).memory_bytes()
            known = {cause: count for cause, count in positive(expected, rank).items() if cause not in later}
            known = {cause: count for cause, count in known.items() if cause not in ("parameters", "gradients")}
            assert {c: n for c, n in positive(held).items() if c not in later} == known, (strategy, rank)


LOW_RANK = [name for name in OPTIONS if name != "adamw"]
_QUICK = ("dct_adamw", "feedback int4", "shared", "frugal", "dion", "smmf")


@pytest.mark.parametrize(
    "options", [pytest.param(each, marks=() if each in _QUICK else pytest.mark.slow) for each in LOW_RANK]
)
def test_bound_state_is_as_planned_on_each_of_five_ranks(options: str) -> None:
    """Uneven blocks and ranks that hold nothing; the optimizer binds to tensors without storage."""
    strategies = ("ddp", "fsdp") if settings(options).precision.name in DTYPES else ("ddp", "fsdp", "zero1", "zero3")
    assert_bound_state_is_as_planned(options, strategies, 5, range(5))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 63, 64])
@pytest.mark.parametrize("options", LOW_RANK)
def test_bound_state_is_as_planned_on_every_rank_of_up_to_64(options: str, world_size: int) -> None:
    strategies = [each for each in STRATEGIES if each != "hsdp" or world_size % 2 == 0]
    if settings(options).precision.name in DTYPES:
        strategies = [each for each in strategies if not each.startswith("zero")]
    assert_bound_state_is_as_planned(options, strategies, world_size, range(world_size))


def test_bound_state_is_as_planned_on_some_of_64_ranks() -> None:
    assert_bound_state_is_as_planned("dct_adamw", ("ddp", "fsdp", "hsdp", "zero1"), 64, range(0, 64, 31))


def _stepped(rank: int, cases: list[tuple[str, str, int]]) -> list[dict[str, int]]:
    """What each case holds after some steps."""
    found = []
    for options, strategy, steps in cases:
        config = configured(options, strategy, dist.get_world_size())
        model: nn.Module = Model(config, "cpu")
        if strategy != "ddp":
            forms = low_rank_forms(route(model, config), config)
            model = apply_strategy(model, [], config.strategy, config.precision, forms, torch.device("cpu"))
        optimizer = make_optimizer(config, route(model, config))
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
                local = getattr(parameter.grad, "_local_tensor", parameter.grad)
                local.copy_(torch.randn(local.shape, generator=generator))
            optimizer.step()
        held = memory_by_cause(model, optimizer)
        found.append({cause: count for cause, count in held.items() if cause != "gradients"})
    return found


@pytest.mark.parametrize("world_size", [3, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 2, 4))])
def test_stepped_optimizers_hold_what_is_planned(world_size: int) -> None:
    """Real processes, dictionaries and diagnostics included, at the step of the first choice and at a later one."""
    strategies = ("ddp", "fsdp", "hsdp") if world_size % 2 == 0 else ("ddp", "fsdp")
    cases = [
        (options, strategy, steps)
        for options in OPTIONS
        for strategy in strategies
        for steps in (1, 3)[world_size == 3 :]
    ]
    for options in OPTIONS:
        settings(options)  # here, so that the ranks need not
    by_rank = run_on_ranks(world_size, _stepped, cases, timeout_seconds=250)
    for number, (options, strategy, steps) in enumerate(cases):
        expected = planned(configured(options, strategy, world_size), world_size, steps)
        del expected["gradients"]
        for rank in range(world_size):
            held, told = positive(by_rank[rank][number]), positive(expected, rank)
            if options == "auto":  # what it measures decides
                assert 0 < held.pop("dictionary") <= told.pop("dictionary"), (strategy, steps, rank)
            assert held == told, (options, strategy, steps, rank)


@pytest.mark.parametrize(
    ("options", "strategy", "measures"), [("auto", "ddp", True), ("auto", "hsdp", False), ("fft", "ddp", False)]
)
def test_a_plan_says_where_auto_makes_it_an_upper_bound(options: str, strategy: str, measures: bool) -> None:
    config = configured(options, strategy, 4)
    parameters = planned_parameters(config, Model(config, "meta"))
    assert keeps_what_is_faster(config, parameters, 4) == measures


@pytest.mark.parametrize("optimizer", TABLE)
def test_planned_weights_and_state_are_as_published(optimizer: str) -> None:
    for size, gigabytes in zip(RANKS, TABLE[optimizer][1][:1], strict=False):  # the smallest; all are in that file
        config = configuration(optimizer, size)
        parameters = planned_parameters(config)
        weights = int(weight_bytes(config, parameters, 1)["parameters"][0])
        state = optimizer_bytes(config, parameters, 1)
        state_bytes = sum(int(count[0]) for cause, count in state.items() if cause not in _LATER)
        assert (weights + state_bytes) / 1e9 == pytest.approx(gigabytes, rel=0.01)
