"""Continues from a checkpoint: finds it, refuses what cannot be followed, checks all of it on all ranks, then loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lowrank.checkpoint.errors import CheckpointError, together
from dist_lowrank.checkpoint.manifest import Checkpoint, TensorEntry, verify_files
from dist_lowrank.checkpoint.random_state import random_state, set_random_state
from dist_lowrank.checkpoint.saver import RANDOM
from dist_lowrank.checkpoint.shards import DTYPES, Shard
from dist_lowrank.checkpoint.state import TrainingState
from dist_lowrank.checkpoint.storage import read_shards
from dist_lowrank.config import ConfigError, RunConfig, to_dict
from dist_lowrank.config.errors import show

# What fixes the meaning of stored numbers; what fixes only their shapes (rank) is here for a better message.
_STRUCTURE = {
    "optimizer": (
        "name",
        "rank",
        "dictionary",
        "subspace",
        "side",
        "moment_dtype",
        "state_dtype",
        "vocabulary",
        "beta1",
        "error_feedback",
        "residual",
        "bias_correction",
        "column_bias_correction",
    ),
    "model": ("architecture", "config", "pretrained", "low_rank", "dense"),
}
_DRAWN = {"random", "gaussian", "stiefel", "coordinates", "blocks"}
_WAY_OUT = "resume.weights_only=true, which takes the weights alone"


def check_can_follow(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuses to continue a checkpoint whose state means something else in this configuration.

    Raises:
        ConfigError: with one line per key that differs, naming both values.
    """
    saved, wanted = checkpoint.sidecar.config, to_dict(config)
    pairs = [(section, key) for section, keys in _STRUCTURE.items() for key in keys]
    optimizer = wanted["optimizer"]
    if {optimizer.get("dictionary"), optimizer.get("subspace")} & _DRAWN:
        pairs.append(("", "seed"))
    lines = []
    for section, key in pairs:
        there, here = (_section(config, section).get(key) for config in (saved, wanted))
        if there != here:
            name = f"{section}.{key}" if section else key
            lines.append(
                f"{name}: {show(here)} cannot continue {checkpoint.path}, which has {show(there)}; "
                f"allowed: {show(there)}, or {_WAY_OUT}"
            )
    if lines:
        raise ConfigError("\n".join(lines))


def load(
    checkpoint: Checkpoint, state: TrainingState, device: torch.device, group: dist.ProcessGroup, *, weights_only: bool
) -> bool:
    """Loads tensors and random state, after all of it was checked on all ranks. Collective.

    Args:
        group: that can gather objects on the CPU.
        weights_only: leave the optimizer and the random state as they are.

    Returns:
        Whether random state was there for this rank to continue with; always, with as many ranks as saved it.

    Raises:
        CheckpointError: files that are not as they were saved; nothing was loaded.
        ConfigError: tensors of other names, shapes or dtypes; nothing was loaded.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    shards = state.to_load(weights_only=weights_only)
    _check_tensors(checkpoint, shards, weights_only)
    together(group, lambda: verify_files(checkpoint, rank, ranks))
    random = {} if weights_only else _random_shards(checkpoint, random_state(device), rank)
    try:
        read_shards(checkpoint.path, {**shards, **random}, group)
    except Exception as error:  # all ranks have it
        raise CheckpointError(f"{checkpoint.path}: cannot be read though it was verified ({error})") from error
    state.loaded()
    if random:
        set_random_state({name.rpartition(".")[2]: shard.tensor for name, shard in random.items()}, device)
    return bool(random)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name, {}) if name else config
    return section if isinstance(section, dict) else {}


def _check_tensors(checkpoint: Checkpoint, shards: Mapping[str, Shard], weights_only: bool) -> None:
    saved = {
        name: entry
        for name, entry in checkpoint.sidecar.tensors.items()
        if name.startswith("model." if weights_only else ("model.", "optimizer."))
    }
    wanted = {name: shard for name, shard in shards.items() if shard.tensor.numel() or 0 not in shard.shape}
    lines = []
    for name in sorted(saved.keys() | wanted.keys()):
        there = saved.get(name)
        here = TensorEntry(DTYPES[wanted[name].tensor.dtype], list(wanted[name].shape)) if name in wanted else None
        same = there == here or (
            weights_only and there is not None and here is not None and there.shape == here.shape
        )  # weights alone may be rounded to another precision
        if not same:
            lines.append(
                f"{name}: {_words(here)} cannot continue {checkpoint.path}, which has {_words(there)}; allowed: the "
                "same (model, optimizer and precision decide)" + ("" if weights_only else f", or {_WAY_OUT}")
            )
    if lines:
        more = [f"... and {len(lines) - 3} more tensors"] if len(lines) > 3 else []
        raise ConfigError("\n".join(lines[:3] + more))


def _words(entry: TensorEntry | None) -> str:
    return "nothing" if entry is None else f"{entry.dtype} {entry.shape}"


def _random_shards(checkpoint: Checkpoint, own: Mapping[str, Tensor], rank: int) -> dict[str, Shard]:
    """Of this rank, or of one that had its number modulo the ranks there were; empty if they are of other shapes."""
    prefix = RANDOM.format(rank % checkpoint.sidecar.world_size)
    shards = {}
    for name, tensor in own.items():
        saved = checkpoint.sidecar.tensors.get(prefix + name)
        if saved == TensorEntry(DTYPES[tensor.dtype], list(tensor.shape)):
            shards[prefix + name] = Shard(torch.empty_like(tensor), tuple(tensor.shape), (0,) * tensor.ndim)
    return shards if len(shards) == len(own) else {}
