"""How a model is spread over ranks: ddp, fsdp (FSDP2 per block), hsdp.

The optimizers read the sharding off the parameters. What a strategy does for them is to choose, for each matrix, the
shard dimension along which its projection is local (`Placement`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from dist_lowrank.config.schema import PrecisionConfig, StrategyConfig
from dist_lowrank.sharding.layouts import LayoutError, TallForm

WEIGHT_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.float32,
    "bf16_weights": torch.bfloat16,
    "fp64": torch.float64,
}


def shard_count(strategy: StrategyConfig, world_size: int, ranks_per_node: int | None = None) -> int:
    """Ranks over which one copy of the model is cut (1 for ddp)."""
    if strategy.name == "ddp":
        return 1
    if strategy.name == "fsdp":
        return world_size
    return strategy.shard_size or min(ranks_per_node or world_size, world_size)


def shard_dimension(form: TallForm, shards: int, name: str) -> int:
    """The dimension along which a matrix has to be cut so that its projection is local.

    Raises:
        LayoutError: FSDP2 cuts dimension 1 evenly only, and this matrix does not divide.
    """
    size = form.shape[form.rows_axis]
    if form.rows_axis == 1 and size % shards:
        raise LayoutError(
            f"parameter {name!r} of shape {form.shape} has side={form.side!r}, so it has to be sharded along dimension "
            f"1, and {size} does not divide by {shards} ranks. Allowed: a number of ranks that divides {size}, "
            "`optimizer.side=right`, a pattern in `model.dense` that takes it off the low-rank path, or `strategy=ddp`"
        )
    return form.rows_axis


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
        id(parameter): shard_dimension(forms[name], shards, name)
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
    ranks_per_node = torch.cuda.device_count() if device.type == "cuda" else None
    shards = shard_count(strategy, world_size, ranks_per_node)
    return init_device_mesh(
        device.type, (math.ceil(world_size / shards), shards), mesh_dim_names=("replicate", "shard")
    )


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
