"""Weights and gradients on each rank, and what a strategy holds beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from dist_lowrank.config.deepspeed_json import deepspeed_json
from dist_lowrank.config.schema import RunConfig
from dist_lowrank.training.planned_parameters import PlannedParameter, by_group
from dist_lowrank.training.shares import Bytes, flat_length, shares

_DEFAULTS = {  # of DeepSpeed, in elements
    "reduce_bucket_size": 500_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
}


def weight_bytes(config: RunConfig, parameters: Sequence[PlannedParameter], world_size: int) -> Bytes:
    """`parameters`, `gradients` and, under DeepSpeed, `master_weights`, as they are between backward and update."""
    if config.strategy.zero_stage is not None:
        return _under_deepspeed(config, parameters, config.strategy.zero_stage, world_size)
    held = numpy.zeros(world_size, dtype=numpy.int64)
    for parameter, share, number in shares(config, parameters, world_size):
        held += number * share.stored * parameter.tensor.element_size()
    return {"parameters": held, "gradients": held}


def strategy_buffers(config: RunConfig, parameters: Sequence[PlannedParameter], world_size: int) -> dict[str, int]:
    """What a strategy holds through the step beside, on every rank, where the trace does not see it."""
    if config.strategy.name == "ddp":  # buckets, a copy of all gradients
        size_bytes = sum(each.tensor.numel() * each.tensor.element_size() for each in parameters)
        return {"collective_buffers": size_bytes if world_size > 1 else 0}
    stage = config.strategy.zero_stage
    if stage is None:
        return {}
    low, everything = _computed_bytes(config), sum(each.tensor.numel() for each in parameters)
    settings = _settings(config, world_size)
    bucket = int(settings["reduce_bucket_size"])
    if stage == 0 or (stage == 1 and low == 2):  # no buffer of its own; what is summed is put together first
        return {"collective_buffers": min(bucket, everything) * low}
    buffers = {"collective_buffers": bucket * low}
    if stage == 3:
        gathered = min(everything, int(settings["stage3_max_live_parameters"])) - _persistent(parameters, settings)
        buffers["gathered_parameters"] = max(0, gathered) * low
    return buffers


def start_bytes(config: RunConfig, parameters: Sequence[PlannedParameter], weights: Bytes) -> int:
    """Every rank makes the whole model on its device, and only then gives most of it away."""
    whole = sum(each.tensor.numel() * each.tensor.element_size() for each in parameters)
    if config.strategy.name == "ddp":
        return whole
    return whole + int(weights["parameters"].max())


def _settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    return {**_DEFAULTS, **deepspeed_json(config, world_size)["zero_optimization"]}


def _persistent(parameters: Sequence[PlannedParameter], settings: Mapping[str, Any]) -> int:
    """Elements of what stage 3 leaves whole."""
    limit = int(settings["stage3_param_persistence_threshold"])
    return sum(each.tensor.numel() for each in parameters if each.tensor.numel() <= limit)


def _computed_bytes(config: RunConfig) -> int:
    """Of a weight that DeepSpeed computes with."""
    return 2 if config.precision.name == "bf16" else 4


def _under_deepspeed(config: RunConfig, parameters: Sequence[PlannedParameter], stage: int, world_size: int) -> Bytes:
    """As version 0.19.8 does by its own defaults, in fp32 or in bf16 with gradients summed in fp32."""
    low, everything = _computed_bytes(config), sum(each.tensor.numel() for each in parameters)
    if stage == 0:
        held = {"parameters": everything * low, "gradients": everything * low}
        return _on_all({**held, "master_weights": 4 * everything} if low == 2 else held, world_size)
    own = sum(flat_length(members, stage, world_size) for members in by_group(parameters))
    if stage == 3:
        kept = _persistent(parameters, _settings(config, world_size))
        return _on_all({"parameters": (own + kept) * low, "master_weights": 4 * own, "gradients": 4 * own}, world_size)
    held = {"parameters": own * world_size * low, "master_weights": 4 * own}
    if low == 4:  # a buffer for all parameters of which the rank has any part
        found = _on_all(held, world_size)
        touched = numpy.zeros(world_size, dtype=numpy.int64)
        for parameter, share, number in shares(config, parameters, world_size):
            touched += number * numpy.where(share.elements > 0, parameter.tensor.numel(), 0)
        return {**found, "gradients": 4 * touched}
    # Stage 1 sums whole gradients in fp32, beside those of the weights.
    return _on_all(
        {**held, "gradients": 4 * own if stage == 2 else 4 * own * world_size + low * everything}, world_size
    )


def _on_all(held: Mapping[str, int], world_size: int) -> Bytes:
    return {cause: numpy.full(world_size, count, dtype=numpy.int64) for cause, count in held.items()}
