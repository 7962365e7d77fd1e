"""Where the rows of a matrix are: plain data, no communication.

An update rule sees a matrix in *tall form*, `L x n`: the axis of length n is compressed, the rows are independent but
for small sums. A layout says which of the L rows this rank works on and how they lie in the parameter's local tensor:

- whole: one process, or a DTensor that nobody shards. All rows.
- row block: a DTensor sharded along the rows axis (FSDP2, HSDP inside a replica). The local tensor is the block.
- replicated: a plain tensor that every rank of a process group holds whole (DDP). Each rank works on a block of the
  rows and keeps only its state; the results are gathered.

Blocks follow `torch.chunk`, as DTensor's do: ceil(L / W) rows each, the last ones short or empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

SIDES = ("shorter", "longer", "right", "left")


class LayoutError(ValueError):
    """A parameter is sharded in a way that the optimizer cannot update exactly."""


@dataclass(frozen=True, slots=True)
class TallForm:
    """How a global `R x C` matrix is seen by an update rule: `rows x n`, compressed to `rows x rank`."""

    shape: tuple[int, int]
    transposed: bool  # the left side: axis 0 is compressed, the tall form is the transpose
    rank: int

    @property
    def rows(self) -> int:
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def n(self) -> int:
        return self.shape[0] if self.transposed else self.shape[1]

    @property
    def rows_axis(self) -> int:
        """The axis of the parameter along which rows of the tall form can be sharded."""
        return 1 if self.transposed else 0

    @property
    def side(self) -> str:
        return "left" if self.transposed else "right"

    def view(self, tensor: Tensor) -> Tensor:
        """The tall view of a (block of a) matrix; shares storage."""
        return tensor.t() if self.transposed else tensor


def tall_form(shape: Sequence[int], side: str, rank: int | float) -> TallForm:
    """Decides side and rank of a matrix from its global shape.

    Args:
        shape: (R, C), global.
        side: `right` compresses axis 1, `left` axis 0, `shorter` the shorter axis (square: right), `longer` the other.
        rank: number of columns (int), or fraction of n (float; `round(rank * n)`, half to even, at least 1). More than
            n means n.
    """
    if side not in SIDES:
        raise ValueError(f"side: {side!r} is not allowed; allowed: {', '.join(SIDES)}")
    rows, cols = shape
    transposed = side == "left" or (side == "shorter" and rows < cols) or (side == "longer" and rows >= cols)
    n = rows if transposed else cols
    count = round(rank * n) if isinstance(rank, float) else rank
    return TallForm((rows, cols), transposed, max(1, min(count, n)))


def chunk_range(length: int, parts: int, index: int) -> tuple[int, int]:
    """Start and stop of one part, as `torch.chunk` cuts."""
    size = -(-length // parts)
    start = min(index * size, length)
    return start, min(start + size, length)


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The rows of one matrix, in tall form, that this rank works on."""

    form: TallForm
    start: int
    stop: int
    group: dist.ProcessGroup | None  # the ranks that together hold all rows; None: this rank alone does
    replicated: bool  # the parameter is whole on every rank of `group`; results have to be gathered
    mesh: DeviceMesh | None  # of the state's DTensors; None: plain tensors
    placements: tuple[Any, ...]

    @property
    def group_size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def largest_block(self) -> int:
        """Rows of the fullest rank: the same number on every rank, so fit for decisions that all must share."""
        return -(-self.form.rows // self.group_size)

    def rows(self, local: Tensor) -> Tensor:
        """This rank's rows, (stop - start, n), as a view of its local tensor of the parameter or gradient."""
        tall = self.form.view(local)
        return tall[self.start : self.stop] if self.replicated else tall

    def sharded_state(self, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros with a row for each row of the matrix, (rows, columns) globally, sharded as this layout says."""
        local = torch.zeros(self.stop - self.start, columns, dtype=dtype, device=device)
        if self.mesh is None:
            return local
        return DTensor.from_local(
            local,
            self.mesh,
            self.placements,
            run_check=False,
            shape=torch.Size((self.form.rows, columns)),
            stride=(columns, 1),
        )


def row_layout(parameter: Tensor, form: TallForm, replicas: DeviceMesh | None, name: str) -> RowLayout:
    """Reads the layout of a matrix off its parameter.

    Args:
        replicas: 1-D mesh of the ranks that hold copies of plain tensors; None for one process.

    Raises:
        LayoutError: if the rows of the tall form are not whole on a rank.
    """
    if isinstance(parameter, DTensor):
        return _dtensor_layout(parameter, form, name)
    if replicas is None:
        return RowLayout(form, 0, form.rows, None, False, None, ())
    start, stop = chunk_range(form.rows, replicas.size(), replicas.get_local_rank())
    group = replicas.get_group() if replicas.size() > 1 else None
    return RowLayout(form, start, stop, group, group is not None, replicas, (Shard(0),))


def _dtensor_layout(parameter: DTensor, form: TallForm, name: str) -> RowLayout:
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
        return RowLayout(form, 0, form.rows, None, False, mesh, tuple(Replicate() for _ in range(mesh.ndim)))
    (axis,) = sharded
    dim = parameter.placements[axis].dim % 2  # type: ignore[attr-defined]
    if dim != form.rows_axis:
        size = form.shape[form.rows_axis]
        raise LayoutError(
            f"parameter {name!r} of shape {form.shape} is sharded along dimension {dim}, which side={form.side!r} "
            f"compresses, over {mesh.size(axis)} ranks. Allowed: shard dimension {form.rows_axis} of size {size} "
            f"(`shard_placement_fn` of `fully_shard`; the size has to divide), side={'left' if dim else 'right'!r}, "
            "low_rank=False, or the ddp strategy"
        )
    start, stop = chunk_range(form.rows, mesh.size(axis), mesh.get_local_rank(axis))
    placements = tuple(Shard(0) if a == axis else Replicate() for a in range(mesh.ndim))
    return RowLayout(form, start, stop, mesh.get_group(axis), False, mesh, placements)


def local_part(full: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> Tensor:
    """This rank's part of a full tensor under DTensor placements (Shard and Replicate); no communication."""
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            start, stop = chunk_range(full.shape[placement.dim], mesh.size(axis), mesh.get_local_rank(axis))
            full = full.narrow(placement.dim, start, stop - start)
    return full


def local(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_offset(tensor: Tensor) -> tuple[int, ...]:
    """Where in the global tensor this rank's local part begins, per dimension; zeros for a plain tensor.

    Raises:
        LayoutError: for placements other than Shard and Replicate, whose local part is no block.
    """
    lengths, offset = list(tensor.shape), [0] * tensor.ndim
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            if type(placement) is Shard:
                dim, mesh = placement.dim, tensor.device_mesh
                start, stop = chunk_range(lengths[dim], mesh.size(axis), mesh.get_local_rank(axis))
                offset[dim] += start
                lengths[dim] = stop - start
            elif not isinstance(placement, Replicate):
                raise LayoutError(f"placement {placement} is not supported; allowed: Shard, Replicate")
    return tuple(offset)
