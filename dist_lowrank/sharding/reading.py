"""Reads the layout of a matrix off its parameter."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dist_lowrank.sharding.exchanged import column_block
from dist_lowrank.sharding.layouts import Layout, LayoutError, RowBlock, TallForm, chunk_range


def sharded_axis(parameter: Tensor) -> int:
    """The axis along which a matrix is sharded; 0, where FSDP shards by default, if it is not."""
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard) and parameter.device_mesh.size(axis) > 1:
                return placement.dim % 2
    return 0


def read_layout(parameter: Tensor, form: TallForm, replicas: DeviceMesh | None, name: str) -> Layout:
    """The layout of a plain tensor or DTensor.

    Args:
        replicas: 1-D mesh of the ranks that hold copies of plain tensors; None for one process.

    Raises:
        LayoutError: a sharding that is not supported.
    """
    if isinstance(parameter, DTensor):
        return _dtensor_layout(parameter, form, name)
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


def _dtensor_layout(parameter: DTensor, form: TallForm, name: str) -> Layout:
    mesh = parameter.device_mesh
    sharded = []
    for axis, placement in enumerate(parameter.placements):
        if type(placement) is Shard:
            if mesh.size(axis) > 1:
                sharded.append(axis)
        elif not isinstance(placement, Replicate):
            raise LayoutError(
                f"parameter {name!r}: placement {placement} is not supported; allowed: Shard on one mesh dimension, "
                "Replicate on the others"
            )
    if len(sharded) > 1:
        raise LayoutError(
            f"parameter {name!r} is sharded over {len(sharded)} mesh dimensions, {parameter.placements}; allowed: one"
        )
    if not sharded:
        whole = tuple(Replicate() for _ in range(mesh.ndim))
        return RowBlock(form=form, start=0, stop=form.rows, mesh=mesh, placements=whole)
    (axis,) = sharded
    placements = tuple(Shard(0) if each == axis else Replicate() for each in range(mesh.ndim))
    if parameter.placements[axis].dim % 2 != form.rows_axis:  # type: ignore[attr-defined]
        return column_block(form, mesh, axis, placements)
    start, stop = chunk_range(form.rows, mesh.size(axis), mesh.get_local_rank(axis))
    return RowBlock(form=form, start=start, stop=stop, group=mesh.get_group(axis), mesh=mesh, placements=placements)
