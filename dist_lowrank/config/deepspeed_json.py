"""DeepSpeed's configuration of a run: what the run decides, over what the user's own JSON says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_lowrank.config.errors import ConfigError, show
from dist_lowrank.config.schema import RunConfig

# Keys that another part of the run stands for.
_TAKEN = {
    "optimizer": "the run's own, `optimizer=...`",
    "scheduler": "the run's own, `schedule=...`",
    "train_batch_size": "none, `train.global_batch_size` decides",
    "fp16": "none, `precision=fp32` or `precision=bf16`",
    "amp": "none, `precision=fp32` or `precision=bf16`",
}


def deepspeed_json(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `strategy=zero0` to `zero3`.

    Raises:
        ConfigError: a file that cannot be read, or one that contradicts the run; a line per key, naming both.
    """
    merged = _read(config.strategy.config) if config.strategy.config is not None else {}
    where = f"strategy.config: {config.strategy.config}"
    problems = [f"{where} has {key!r}; allowed: {_TAKEN[key]}" for key in _TAKEN if not _off(merged.pop(key, "auto"))]
    for path, value, origin in _decided(config, world_size):
        *sections, key = path.split(".")
        node = merged
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{where} says {section}={show(node)}; allowed: a section")
        given = node.get(key, "auto")  # as others write for "whatever the trainer says"
        if given not in ("auto", value):
            problems.append(f"{where} says {path}={show(given)}, but {origin}; allowed: {show(value)}, or leave it out")
        node[key] = value
    if problems:
        raise ConfigError("\n".join(problems))
    for path, value in _defaults(config):
        *sections, key = path.split(".")
        node = merged
        for section in sections:
            node = node.setdefault(section, {})
        node.setdefault(key, value)
    return merged


def _off(section: Any) -> bool:
    """Whether a taken key leaves it to the run after all."""
    return section == "auto" or (isinstance(section, dict) and section.get("enabled") is False)


def _decided(config: RunConfig, world_size: int) -> Iterator[tuple[str, Any, str]]:
    """Keys of DeepSpeed that follow from the run: key, value, and from what of the run."""
    train, strategy, precision = config.train, config.strategy.name, config.precision.name
    parts = math.ceil(train.global_batch_size / world_size / train.micro_batch_size)
    batch = f"train.global_batch_size={train.global_batch_size} on {world_size} ranks"
    yield "train_micro_batch_size_per_gpu", train.micro_batch_size, f"train.micro_batch_size={train.micro_batch_size}"
    yield "gradient_accumulation_steps", parts, f"{batch} makes {parts} micro-batches"
    yield "gradient_clipping", train.clip_norm or 0.0, f"train.clip_norm={show(train.clip_norm)}"
    yield "zero_optimization.stage", int(strategy[-1]), f"strategy={strategy}"
    yield "bf16.enabled", precision == "bf16", f"precision={precision}"
    yield "bf16.check_grad_overflow", True, "a gradient that is not finite skips the update"
    yield "zero_allow_untested_optimizer", True, "DeepSpeed does not know the optimizers here"
    yield "zero_force_ds_cpu_optimizer", False, "the optimizer is not DeepSpeed's"


def _defaults(config: RunConfig) -> Iterator[tuple[str, Any]]:
    yield "steps_per_print", 10**9
    if config.precision.name == "bf16" and config.strategy.name != "zero0":
        # As the other strategies do: gradients are summed, over micro-batches and ranks, in fp32.
        yield "data_types.grad_accum_dtype", "fp32"
        yield "communication_data_type", "fp32"


def _read(path: str) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"strategy.config: {path} cannot be read ({error}); allowed: a JSON file") from error
    if not isinstance(data, dict):
        raise ConfigError(f"strategy.config: {path} holds {type(data).__name__}; allowed: a JSON object")
    return data
