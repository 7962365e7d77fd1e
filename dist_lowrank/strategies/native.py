"""How torch itself spreads a model over ranks: ddp, fsdp (FSDP2 per block), hsdp.

The optimizers read the sharding off the parameters. What a strategy does for them is to choose, for each matrix, the
shard dimension along which its projection is local (`Placement`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from dist_lowrank.sharding.layouts import LayoutError, TallForm

if TYPE_CHECKING:
    from dist_lowrank.config.schema import PrecisionConfig, StrategyConfig

WEIGHT_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.float32,
    "bf16_weights": torch.bfloat16,
    "fp64": torch.float64,
}


def shard_count(strategy: StrategyConfig, world_size: int) -> int:
    """Ranks over which torch cuts one copy of the model: 1 for ddp, by default the ranks of a node for hsdp.

    Raises:
        LayoutError: the copies would not be of equal size.
    """
    if strategy.name == "ddp":
        return 1
    if strategy.name == "fsdp":
        return world_size
    shards = strategy.shard_size or min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)
    if world_size % shards:
        raise LayoutError(
            f"strategy.shard_size: {strategy.shard_size or 'null'} is not allowed, {world_size} processes are no "
            f"multiple of {shards}; allowed: a divisor of {world_size}"
        )
    return shards


def shard_dimension(form: TallForm, shards: int) -> int:
    """The dimension along which to cut a matrix: where its rows stay whole if FSDP2 can cut there.

    FSDP2 cuts dimension 1 evenly only. A matrix whose rows would lie along it and do not divide is cut along
    dimension 0, and its rows are exchanged at each step.
    """
    return 1 if form.rows_axis == 1 and form.shape[1] % shards == 0 else 0


def apply_strategy(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    strategy: StrategyConfig,
    precision: PrecisionConfig,
    forms: Mapping[str, TallForm],
    device: torch.device,
) -> nn.Module:
    """Wraps or shards a model whose parameters are equal on all ranks.

    Args:
        blocks: the repeated layers of `model`; each is gathered and freed as one unit by fsdp and hsdp.
        forms: the low-rank matrices by parameter name.

    Returns:
        What to call in training: a DistributedDataParallel around the model, or the model itself, sharded in place.
    """
    if strategy.name == "ddp":
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    mesh = _mesh(strategy, device)
    shards = mesh.size(mesh.ndim - 1)
    dimensions = {
        id(parameter): shard_dimension(forms[name], shards)
        for name, parameter in model.named_parameters()
        if name in forms
    }
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": strategy.reshard_after_forward,
        "shard_placement_fn": lambda parameter: Shard(dimensions.get(id(parameter), 0)),
    }
    if precision.name in ("bf16", "bf16_weights"):
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def _mesh(strategy: StrategyConfig, device: torch.device) -> DeviceMesh:
    world_size = dist.get_world_size()
    if strategy.name == "fsdp":
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    shards = shard_count(strategy, world_size)
    return init_device_mesh(device.type, (world_size // shards, shards), mesh_dim_names=("replicate", "shard"))


def autocast(strategy: StrategyConfig, precision: PrecisionConfig, device: torch.device) -> Any:
    """The context of a forward pass. FSDP2 casts by itself; ddp keeps fp32 weights and needs autocast for bf16."""
    if precision.name == "bf16" and strategy.name == "ddp":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def gradient_sync(model: nn.Module, enabled: bool) -> Any:
    """The context of a backward pass that does, or does not, sum gradients over ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        return nullcontext()
    if isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return nullcontext()


def reshard(model: nn.Module) -> None:
    """Frees gathered weights, which FSDP2 keeps until the backward pass where `reshard_after_forward` is false.

    Until then the model's parameters are the gathered ones, and the optimizer's have no memory.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
