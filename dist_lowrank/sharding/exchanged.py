"""Layouts whose rows are not whole on a rank: what has to be exchanged so that they are, and how results go back.

- `ColumnBlock`: a DTensor sharded along the compressed axis. Each rank takes a block of the rows; an all-to-all turns
  column blocks into row blocks. Back go the coefficients (L x r, gathered), or the updated rows, whichever is less.
- `FlatRows`: a contiguous run of the elements of a row-major matrix, cut anywhere (ZeRO, FSDP1), whose rows are the
  rows of the tall form. Whole rows are at hand; a row torn by a cut is completed on each of its holders, which all
  compute its update and keep their own fragment, so nothing goes back. It counts in sums at the holder of its first
  element alone.
- `FlatColumns`: the same run where the rows of the tall form are the matrix's columns. Each rank takes a block of
  columns; fragments go to them and updates come back.
- `MovedRows`: the run of `FlatRows`, but of a piece of a DTensor, whose state has to be cut evenly to be a DTensor:
  each rank takes an even block of rows; fragments go to them and updates come back.

All of it is arithmetic on who holds what, which every rank knows; `dist_lowrank.sharding.rounds` moves the bytes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dist_lowrank.sharding.flat_slices import FlatSlice, check_slices
from dist_lowrank.sharding.layouts import Layout, TallForm, chunk_range


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged(Layout):
    """Parts of rows go to the ranks that work on them. Shapes and order are what every rank can work out."""

    @property
    def exchanges(self) -> bool:
        return True

    @abstractmethod
    def outgoing(self, gradient: Tensor) -> list[Tensor]:
        """What this rank sends of its local gradient, by rank."""

    @abstractmethod
    def incoming_shapes(self) -> Sequence[tuple[int, ...]]:
        """Of what it receives, by rank."""

    @abstractmethod
    def assemble(self, gradient: Tensor, incoming: Sequence[Tensor]) -> Tensor:
        """This rank's rows, (stop - start, n); nothing is incoming where no exchange is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered(Exchanged):
    """Updated rows go back to the ranks that hold parts of them."""

    def delivery(self, full_rows: bool = False) -> str:
        return "rows"

    @abstractmethod
    def outgoing_update(self, rows: Tensor) -> list[Tensor]:
        """What this rank sends of the lifted update of its rows, (stop - start, n), by rank."""

    @abstractmethod
    def incoming_update_shapes(self) -> Sequence[tuple[int, ...]]:
        """Of what it receives, by rank."""

    @abstractmethod
    def add_update(self, weight: Tensor, incoming: Sequence[Tensor], *, decay: float, scale: float) -> None:
        """In place: `weight = decay * weight + scale * update` on the local tensor of the parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnBlock(Delivered):
    """All rows of the tall form, and of each a block of its columns."""

    rank: int
    world_size: int

    def delivery(self, full_rows: bool = False) -> str:
        return "coefficients" if self.form.rank * self.world_size <= self.form.n and not full_rows else "rows"

    @property
    def largest_part(self) -> int:
        return self.form.rows * -(-self.form.n // self.world_size)

    @property
    def columns(self) -> slice:
        return slice(*chunk_range(self.form.n, self.world_size, self.rank))

    @property
    def offset(self) -> tuple[int, ...]:
        return (self.columns.start, 0) if self.form.transposed else (0, self.columns.start)

    def outgoing(self, gradient: Tensor) -> list[Tensor]:
        tall = self.form.view(gradient)  # (L, n_k)
        return [tall[slice(*chunk_range(self.form.rows, self.world_size, k))] for k in range(self.world_size)]

    def incoming_shapes(self) -> list[tuple[int, int]]:
        return [(self.stop - self.start, width) for width in self._widths()]

    def assemble(self, gradient: Tensor, incoming: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(incoming), dim=1)

    def outgoing_update(self, rows: Tensor) -> list[Tensor]:
        return list(torch.split(rows, self._widths(), dim=1))

    def incoming_update_shapes(self) -> list[tuple[int, int]]:
        width = self._widths()[self.rank]
        ranges = (chunk_range(self.form.rows, self.world_size, k) for k in range(self.world_size))
        return [(stop - start, width) for start, stop in ranges]

    def add_update(self, weight: Tensor, incoming: Sequence[Tensor], *, decay: float, scale: float) -> None:
        self.form.view(weight).mul_(decay).add_(torch.cat(list(incoming)), alpha=scale)

    def _widths(self) -> list[int]:
        ranges = (chunk_range(self.form.n, self.world_size, k) for k in range(self.world_size))
        return [stop - start for start, stop in ranges]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flat(Exchanged):
    """What the layouts of flat slices share."""

    rank: int
    slices: tuple[FlatSlice, ...]  # of all ranks of the group

    @property
    def own(self) -> FlatSlice:
        return self.slices[self.rank]

    @property
    def offset(self) -> tuple[int, ...]:
        return (self.own.start,)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatRows(_Flat):
    """A flat slice whose matrix rows are the rows of the tall form (the right side)."""

    @property
    def exchanges(self) -> bool:
        return any(each.torn_rows() for each in self.slices)

    def delivery(self, full_rows: bool = False) -> str:
        return "own rows"

    @property
    def repeated(self) -> bool:
        return self.exchanges  # torn rows

    @property
    def largest_block(self) -> int:
        return max(each.last_row - each.first_row for each in self.slices)

    @property
    def owned(self) -> slice:
        return slice(self.owned_by_rank()[self.rank][0] - self.start, None)

    def rows_by_rank(self) -> list[tuple[int, int]]:
        return [(each.first_row, each.last_row) for each in self.slices]

    def owned_by_rank(self) -> list[tuple[int, int]]:
        begun = [each.offset > 0 and each.stop > each.start for each in self.slices]  # its first row, by a rank before
        return [(start + first, stop) for first, (start, stop) in zip(begun, self.rows_by_rank(), strict=True)]

    def outgoing(self, gradient: Tensor) -> list[Tensor]:
        nothing = gradient[:0]
        return [torch.cat([nothing, *(self._fragment(gradient, row) for row in rows)]) for rows in self._shared_rows()]

    def _fragment(self, values: Tensor, row: int) -> Tensor:
        start, stop = self.own.overlap(row)
        first = row * self.form.n + start - self.own.start
        return values[first : first + stop - start]

    def _shared_rows(self) -> list[list[int]]:
        """By rank: the torn rows that it holds a part of, as this rank does."""
        mine = self.own.torn_rows()
        return [
            [row for row in mine if k != self.rank and each.overlap(row)[0] < each.overlap(row)[1]]
            for k, each in enumerate(self.slices)
        ]

    def incoming_shapes(self) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        for each, rows in zip(self.slices, self._shared_rows(), strict=True):
            shapes.append((sum(stop - start for start, stop in map(each.overlap, rows)),))
        return shapes

    def assemble(self, gradient: Tensor, incoming: Sequence[Tensor]) -> Tensor:
        rows = self.own.padded_rows(gradient)
        # `incoming` is empty where no row is torn on any rank.
        for each, shared, received in zip(self.slices, self._shared_rows(), incoming, strict=bool(incoming)):
            position = 0
            for row in shared:
                start, stop = each.overlap(row)
                rows[row - self.start, start:stop] = received[position : position + stop - start]
                position += stop - start
        return rows

    def add_rows(self, weight: Tensor, rows: Tensor, *, decay: float, scale: float) -> None:
        """In place: `weight = decay * weight + scale * rows`, of this rank's own lifted rows what its slice holds."""
        weight.mul_(decay).add_(self.own.cut(rows), alpha=scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatColumns(_Flat, Delivered):
    """A flat slice whose matrix columns are the rows of the tall form (the left side)."""

    @property
    def largest_part(self) -> int:
        return max(each.last_row - each.first_row for each in self.slices) * self.form.rows

    def outgoing(self, gradient: Tensor) -> list[Tensor]:
        return list(torch.split(self.own.padded_rows(gradient), self._widths(), dim=1))

    def incoming_shapes(self) -> list[tuple[int, int]]:
        return [(each.last_row - each.first_row, self.stop - self.start) for each in self.slices]

    def assemble(self, gradient: Tensor, incoming: Sequence[Tensor]) -> Tensor:
        block = gradient.new_zeros(self.form.n, self.stop - self.start)  # (R, columns)
        for each, received in zip(self.slices, incoming, strict=True):
            block[each.first_row : each.last_row] += received  # a torn row comes in parts, zero elsewhere
        return block.t()

    def outgoing_update(self, rows: Tensor) -> list[Tensor]:
        block = rows.t()  # (R, columns)
        return [block[each.first_row : each.last_row] for each in self.slices]

    def incoming_update_shapes(self) -> list[tuple[int, int]]:
        return [(self.own.last_row - self.own.first_row, width) for width in self._widths()]

    def add_update(self, weight: Tensor, incoming: Sequence[Tensor], *, decay: float, scale: float) -> None:
        weight.mul_(decay).add_(self.own.cut(torch.cat(list(incoming), dim=1)), alpha=scale)

    def _widths(self) -> list[int]:
        ranges = (chunk_range(self.form.rows, len(self.slices), k) for k in range(len(self.slices)))
        return [stop - start for start, stop in ranges]


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedRows(_Flat, Delivered):
    """A flat slice whose matrix rows are the rows of the tall form, worked on in even blocks of rows.

    For matrices whose state has to be sharded evenly though they are not: pieces of a DTensor.
    """

    @property
    def largest_part(self) -> int:
        return max(each.stop - each.start for each in self.slices)

    def outgoing(self, gradient: Tensor) -> list[Tensor]:
        start = self.own.start
        return [gradient[max(0, first - start) : max(0, last - start)] for first, last in self._blocks()]

    def incoming_shapes(self) -> list[tuple[int, ...]]:
        first, last = self._blocks()[self.rank]
        return [(max(0, min(each.stop, last) - max(each.start, first)),) for each in self.slices]

    def assemble(self, gradient: Tensor, incoming: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(incoming)).view(-1, self.form.n)

    def outgoing_update(self, rows: Tensor) -> list[Tensor]:
        return list(torch.split(rows.reshape(-1), [size for (size,) in self.incoming_shapes()]))

    def incoming_update_shapes(self) -> list[tuple[int, ...]]:
        own = self.own
        return [(max(0, min(own.stop, last) - max(own.start, first)),) for first, last in self._blocks()]

    def add_update(self, weight: Tensor, incoming: Sequence[Tensor], *, decay: float, scale: float) -> None:
        weight.mul_(decay).add_(torch.cat(list(incoming)), alpha=scale)

    def _blocks(self) -> list[tuple[int, int]]:
        """By rank: the elements of the rows that it works on."""
        ranges = (chunk_range(self.form.rows, len(self.slices), k) for k in range(len(self.slices)))
        return [(start * self.form.n, stop * self.form.n) for start, stop in ranges]


def flat_layout(
    form: TallForm,
    slices: Sequence[FlatSlice],
    rank: int,
    group: dist.ProcessGroup | None,
    mesh: DeviceMesh | None = None,
    placements: tuple[Any, ...] = (),
) -> FlatRows | FlatColumns | MovedRows:
    """The layout of a matrix that the ranks of a group hold as consecutive flat slices.

    Args:
        slices: by rank; together they cover every element exactly once, in order.
        mesh, placements: of the state, if it is to be DTensors.

    Raises:
        ValueError: elements are missing or held twice.
    """
    check_slices(form.shape, slices)
    own = slices[rank]
    shared: dict[str, Any] = {"form": form, "group": group, "rank": rank, "slices": tuple(slices)}
    if not form.transposed and mesh is None:
        return FlatRows(start=own.first_row, stop=own.last_row, **shared)
    start, stop = chunk_range(form.rows, len(slices), rank)
    kind = FlatColumns if form.transposed else MovedRows
    return kind(start=start, stop=stop, mesh=mesh, placements=placements, **shared)


def column_block(form: TallForm, mesh: DeviceMesh, axis: int, placements: tuple[object, ...]) -> ColumnBlock:
    """The layout of a DTensor that is sharded along the compressed axis on one dimension of its mesh."""
    rank, ranks = mesh.get_local_rank(axis), mesh.size(axis)
    start, stop = chunk_range(form.rows, ranks, rank)
    return ColumnBlock(
        form=form,
        start=start,
        stop=stop,
        group=mesh.get_group(axis),
        mesh=mesh,
        placements=placements,
        rank=rank,
        world_size=ranks,
    )
