"""Where the rows of a matrix are: plain data, no communication.

An update rule sees a matrix in *tall form*, `L x n`: the axis of length n is compressed, the rows are independent but
for small sums. A layout says which of the L rows this rank works on and how they lie in the parameter's local tensor:

- whole: one process, or a DTensor that nobody shards. All rows.
- row block: a DTensor sharded along the rows axis (FSDP2, HSDP inside a replica). The local tensor is the block.
- replicated: a plain tensor that every rank of a process group holds whole (DDP). Each rank works on a block of the
  rows and keeps only its state; the results are gathered.

Layouts that have to exchange parts of rows first are in `dist_lowrank.sharding.exchanged`.

Blocks follow `torch.chunk`, as DTensor's do: ceil(L / W) rows each, the last ones short or empty.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

SIDES = ("shorter", "shorter_left", "longer", "right", "left", "unsharded")


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


def tall_form(shape: Sequence[int], side: str, rank: int | float, sharded_axis: int = 0) -> TallForm:
    """Decides side and rank of a matrix from its global shape.

    Args:
        shape: (R, C), global.
        side: `right` compresses axis 1, `left` axis 0, `shorter` the shorter axis (square: right; `shorter_left`:
            left), `longer` the other, `unsharded` the one that is not `sharded_axis`, so that rows are always whole.
        rank: number of columns (int), or fraction of n (float; `round(rank * n)`, half to even, at least 1). More than
            n means n.
    """
    if side not in SIDES:
        raise ValueError(f"side: {side!r} is not allowed; allowed: {', '.join(SIDES)}")
    rows, cols = shape
    transposed = (
        side == "left"
        or (side == "shorter" and rows < cols)
        or (side == "shorter_left" and rows <= cols)
        or (side == "longer" and rows >= cols)
        or (side == "unsharded" and sharded_axis == 1)
    )
    n = rows if transposed else cols
    count = round(rank * n) if isinstance(rank, float) else rank
    return TallForm((rows, cols), transposed, max(1, min(count, n)))


def chunk_range(length: int, parts: int, index: int) -> tuple[int, int]:
    """Start and stop of one part, as `torch.chunk` cuts."""
    size = -(-length // parts)
    start = min(index * size, length)
    return start, min(start + size, length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout(ABC):
    """The rows of one matrix, in tall form, that this rank works on and keeps the state of."""

    form: TallForm
    start: int
    stop: int
    group: dist.ProcessGroup | None = None  # the ranks that together hold all rows; None: this rank alone does
    mesh: DeviceMesh | None = None  # of the state's DTensors; None: plain tensors
    placements: tuple[Any, ...] = ()

    @property
    def exchanges(self) -> bool:
        """Whether ranks have to exchange parts of the gradient before rows are whole; the same on all ranks."""
        return False

    @abstractmethod
    def delivery(self, full_rows: bool = False) -> str:
        """How the update gets from the rows worked on to the parameter's local tensor.

        Args:
            full_rows: it consists of whole rows, not only of coefficients.

        `local`: they are the same rows. `coefficients`: the directions of all ranks are gathered, L x r, and lifted on
        each. `rows`: lifted rows are exchanged. `own rows`: lifted rows are cut.
        """

    @property
    def owned(self) -> slice:
        """Of the rows worked on, those that count in sums on this rank; every row counts on one rank."""
        return slice(None)

    def rows_by_rank(self) -> list[tuple[int, int]]:
        """The rows that each rank of the group works on, as start and stop."""
        return [chunk_range(self.form.rows, self.group_size, k) for k in range(self.group_size)]

    def owned_by_rank(self) -> list[tuple[int, int]]:
        """Of these, the ones that count in sums: every row on one rank."""
        return self.rows_by_rank()

    @property
    @abstractmethod
    def offset(self) -> tuple[int, ...]:
        """Where this rank's part begins in the matrix: row and column, or, for a flat slice, the element."""

    @property
    def columns(self) -> slice:
        """Of the n columns, those in the parameter's local tensor, for deliveries of coefficients."""
        return slice(None)

    @property
    def group_size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def repeated(self) -> bool:
        """Whether other ranks do the same work on the same rows: the replicas of HSDP, a replicated DTensor."""
        return self.mesh is not None and self.mesh.size() > self.group_size

    @property
    def largest_block(self) -> int:
        """Rows of the fullest rank: the same number on every rank, so fit for decisions that all must share."""
        return -(-self.form.rows // self.group_size)

    @property
    def largest_part(self) -> int:
        """Elements of the fullest rank's local tensor of the parameter, or a few more; the same on every rank."""
        return self.form.n * self.largest_block


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlock(Layout):
    """Whole rows are at hand: all of them, or the block that the local tensor is, or a share of a replicated matrix."""

    replicated: bool = False  # the parameter is whole on every rank of `group`; results have to be gathered

    def delivery(self, full_rows: bool = False) -> str:
        return "coefficients" if self.replicated else "local"

    @property
    def offset(self) -> tuple[int, ...]:
        start = 0 if self.replicated else self.start
        return (0, start) if self.form.transposed else (start, 0)

    @property
    def largest_part(self) -> int:
        return self.form.n * (self.form.rows if self.replicated else self.largest_block)

    def rows(self, local: Tensor) -> Tensor:
        """This rank's rows, (stop - start, n), as a view of its local tensor of the parameter or gradient."""
        tall = self.form.view(local)
        return tall[self.start : self.stop] if self.replicated else tall


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
