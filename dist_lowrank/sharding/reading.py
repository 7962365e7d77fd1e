"""Reads the layout of a matrix off its parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dist_lowrank.sharding.exchanged import column_block, flat_layout
from dist_lowrank.sharding.layouts import Layout, LayoutError, RowBlock, TallForm, chunk_range
from dist_lowrank.sharding.pieces import Piece


def sharded_axis(piece: Piece, parameter: Tensor) -> int:
    """The axis along which a matrix is sharded; 0, where FSDP shards by default, if it is not."""
    for axis, placement in enumerate(piece.placements):
        if isinstance(placement, Shard) and parameter.device_mesh.size(axis) > 1:  # type: ignore[attr-defined]
            return placement.dim
    return 0


def read_layout(
    piece: Piece, parameter: Tensor, form: TallForm, replicas: DeviceMesh | None, flat_group: ProcessGroup | None
) -> Layout:
    """The layout of a matrix.

    Args:
        replicas: 1-D mesh of the ranks that hold copies of plain tensors; None for one process.
        flat_group: the ranks that hold a flat tensor's slices.

    Raises:
        LayoutError: a sharding that is not supported.
    """
    if isinstance(parameter, DTensor):
        return _dtensor_layout(piece, parameter.device_mesh, form)
    if flat_group is not None:
        return flat_layout(form, piece.flat, flat_group.rank(), flat_group)
    if replicas is None:
        return RowBlock(form=form, start=0, stop=form.rows)
    start, stop = chunk_range(form.rows, replicas.size(), replicas.get_local_rank())
    group = replicas.get_group() if replicas.size() > 1 else None
    return RowBlock(
        form=form,
        start=start,
        stop=stop,
        group=group,
        mesh=replicas,
        placements=(Shard(0),),
        replicated=group is not None,
    )


def _dtensor_layout(piece: Piece, mesh: DeviceMesh, form: TallForm) -> Layout:
    sharded = []
    for axis, placement in enumerate(piece.placements):
        if type(placement) is Shard:
            if mesh.size(axis) > 1:
                sharded.append(axis)
        elif not isinstance(placement, Replicate):
            raise LayoutError(
                f"parameter {piece.name!r}: placement {placement} is not supported; allowed: Shard on one mesh "
                "dimension, Replicate on the others" + _way_out(placement)
            )
    if len(sharded) > 1:
        raise LayoutError(
            f"parameter {piece.name!r} is sharded over {len(sharded)} mesh dimensions, {piece.placements}; allowed: "
            "one. Keep it whole on the other (Replicate), or put it in a group with low_rank=False"
        )
    if not sharded:
        whole = tuple(Replicate() for _ in range(mesh.ndim))
        return RowBlock(form=form, start=0, stop=form.rows, mesh=mesh, placements=whole)
    (axis,) = sharded
    placements = tuple(Shard(0) if each == axis else Replicate() for each in range(mesh.ndim))
    group = mesh.get_group(axis)
    if piece.flat:
        return flat_layout(form, piece.flat, mesh.get_local_rank(axis), group, mesh, placements)
    if piece.placements[axis].dim != form.rows_axis:
        return column_block(form, mesh, axis, placements)
    start, stop = chunk_range(form.rows, mesh.size(axis), mesh.get_local_rank(axis))
    return RowBlock(form=form, start=start, stop=stop, group=group, mesh=mesh, placements=placements)


def _way_out(placement: Any) -> str:
    if "Strided" in type(placement).__name__:
        return (
            ". Strided shards come from tensor parallelism and FSDP on one dimension: let `shard_placement_fn` cut "
            "the other one, or put the parameter in a group with low_rank=False"
        )
    return ""
