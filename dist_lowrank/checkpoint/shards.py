"""What a rank holds of a tensor, in global terms: what every strategy is translated to before anything is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_lowrank.sharding.layouts import chunk_range, global_offset, local

_SMALL_BYTES = 64 * 1024  # what is smaller is saved by the first of its holders; larger replicas by all, in parts

DTYPES = {  # what state can be of, in the words of safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Shard:
    """A block of a global tensor. Equal copies of it are held by `copies` ranks, of which this is number `copy`."""

    tensor: Tensor  # the live one, or a view of it; plain
    shape: tuple[int, ...]  # global
    offset: tuple[int, ...]  # of the block
    copy: int = 0
    copies: int = 1


def shard_of(tensor: Tensor) -> Shard:
    """What this rank holds of a DTensor, or of a plain tensor that is the same on all ranks.

    Raises:
        LayoutError: for placements other than Shard and Replicate.
    """
    offset, block = global_offset(tensor), local(tensor.detach())
    if not isinstance(tensor, DTensor):
        return Shard(block, tuple(tensor.shape), offset, dist.get_rank(), dist.get_world_size())
    copy, copies = 0, 1
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            size = tensor.device_mesh.size(axis)
            copy, copies = copy * size + tensor.device_mesh.get_local_rank(axis), copies * size
    return Shard(block, tuple(tensor.shape), offset, copy, copies)


def own_parts(shards: Mapping[str, Shard]) -> dict[str, Shard]:
    """What this rank has to save, so that all ranks together save every element once."""
    parts = {name: _own_part(shard) for name, shard in shards.items()}
    return {name: part for name, part in parts.items() if part is not None and part.tensor.numel()}


def _own_part(shard: Shard) -> Shard | None:
    tensor = shard.tensor
    if tensor.ndim == 0 or tensor.numel() * tensor.element_size() < _SMALL_BYTES or shard.copies == 1:
        return shard if shard.copy == 0 else None
    start, stop = chunk_range(tensor.shape[0], shard.copies, shard.copy)
    offset = (shard.offset[0] + start, *shard.offset[1:])
    return replace(shard, tensor=tensor[start:stop], offset=offset, copy=0, copies=1)


def stored_bytes(shard: Shard) -> int:
    """Of the whole tensor."""
    return math.prod(shard.shape) * shard.tensor.element_size()
