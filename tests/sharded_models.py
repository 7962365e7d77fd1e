"""A model of bare parameters, the ways to shard it, and the optimizers that are compared on it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dist_lowrank.optim import DCTAdamW, Trion
from dist_lowrank.sharding.layouts import tall_form

# Rows that do not divide, fewer rows than ranks (ranks that hold nothing), left sides (an even size across), and
# parameters on the dense path, some of them smaller than the world.
SHAPES = {
    "tall.weight": (10, 6),
    "odd.weight": (7, 5),
    "few.weight": (3, 2),
    "wide.weight": (5, 12),
    "square.weight": (8, 8),
    "one.weight": (1, 8),
    "norm.weight": (6,),
    "bias.weight": (1,),
}
LOW_BIT = ["dct_adamw_int8", "dct_adamw_int4", "dct_adamw_bf16"]
STRATEGIES = ["ddp", "fsdp", "hsdp"]
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "dct_adamw": (DCTAdamW, {"lr": 0.01, "weight_decay": 0.1, "rank": 0.5}),
    "dct_adamw_every_third": (DCTAdamW, {"lr": 0.01, "rank": 0.5, "refresh_interval": 3, "ranking": "l1"}),
    "dct_adamw_feedback": (
        DCTAdamW,
        {"lr": 0.01, "rank": 0.5, "error_feedback": "fp32", "column_bias_correction": True},
    ),
    "dct_adamw_int8": (
        DCTAdamW,
        {"lr": 0.01, "rank": 0.5, "error_feedback": "int8", "moment_dtype": torch.int8, "column_bias_correction": True},
    ),
    "dct_adamw_int4": (
        DCTAdamW,
        {"lr": 0.01, "rank": 0.5, "error_feedback": "int4", "error_feedback_momentum": True, "refresh_interval": 3},
    ),
    "dct_adamw_bf16": (
        DCTAdamW,
        {"lr": 0.01, "rank": 0.5, "error_feedback": "bf16", "moment_dtype": torch.bfloat16},
    ),
    "dct_adamw_unsharded": (DCTAdamW, {"lr": 0.01, "rank": 0.5, "side": "unsharded"}),
    "dct_adamw_previous": (DCTAdamW, {"lr": 0.01, "rank": 0.5, "selection": "previous"}),
    "trion": (Trion, {"lr": 0.01, "rank": 0.5}),
} | {
    f"{name}_operands": (make, {"lr": 0.01, "rank": 0.5, "transform_precision": "bf16", **options})
    for name, make, options in (("dct_adamw", DCTAdamW, {"refresh_interval": 2}), ("trion", Trion, {}))
}
OPERANDS = ["dct_adamw_operands", "trion_operands"]  # in bfloat16


class Model(nn.Module):
    """Parameters alone; gradients are prescribed."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            child = nn.Module()
            child.weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
            self.add_module(name.removesuffix(".weight"), child)


def gradients(step: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def shard(model: nn.Module, strategy: str, world_size: int, rank: int | float) -> None:
    if strategy == "fsdp_rows":  # also where the rows axis is cut: exchanged
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
        return
    if strategy == "ddp":
        return  # the optimizer sees the plain parameters of the wrapped module
    if strategy == "fsdp":
        mesh = init_device_mesh("cpu", (world_size,))
    else:
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    left = {id(p) for p in model.parameters() if p.ndim == 2 and tall_form(p.shape, "shorter", rank).transposed}
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if id(p) in left else Shard(0))


def placed_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A full gradient, sharded as its parameter is."""
    if not isinstance(parameter, DTensor):
        return gradient
    return distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def random_cuts(shapes: dict[str, tuple[int, ...]], world_size: int) -> dict[str, list[tuple[int, int]]]:
    """Start and stop by rank: anywhere, also several within a row, also nothing."""
    generator = torch.Generator().manual_seed(world_size)
    cuts = {}
    for name, shape in shapes.items():
        inner = torch.randint(0, math.prod(shape) + 1, (world_size - 1,), generator=generator).sort().values.tolist()
        borders = [0, *inner, math.prod(shape)]
        cuts[name] = list(pairwise(borders))
    return cuts


def joined(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part.detach().clone())
    return torch.cat(parts).view(shape)


def matrix_forms(options: dict[str, Any]) -> list[Any]:
    return [tall_form(shape, "shorter", options["rank"]) for shape in SHAPES.values() if len(shape) == 2]
