"""Pieces: what a parameter consists of, and where each lies in the parameter's local tensor.

Most parameters are one piece. An expert stack (E, R, C) can be taken as E matrices, a fused weight as one matrix per
size, a convolution as one matrix after flattening; and the flat tensors of DeepSpeed hold slices of many parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dist_lowrank.sharding.flat_slices import FlatSlice, check_slices
from dist_lowrank.sharding.layouts import LayoutError, chunk_range

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class FlatPart:
    """What a flat tensor holds of one parameter: on each rank a contiguous run of its elements, which may be empty."""

    name: str
    offset: int  # in this rank's flat tensor, of its run's first element
    slices: tuple[FlatSlice, ...]  # by rank


@dataclass(frozen=True, slots=True)
class FlatPlace:
    """A 1-D parameter consists of parts of other parameters, cut over the ranks of a group."""

    parts: tuple[FlatPart, ...]
    group: dist.ProcessGroup


@dataclass(frozen=True, slots=True)
class Stack:
    """A piece is one of the E matrices of its parameter, which share their state tensors."""

    size: int  # E
    index: int
    start: int  # this rank holds matrices `start` to `stop`
    stop: int
    mesh_axis: int | None  # along which the matrices are divided; None: every rank has all

    @property
    def present(self) -> bool:
        return self.start <= self.index < self.stop


@dataclass(frozen=True, slots=True)
class Piece:
    """A matrix or a dense tensor within a parameter."""

    name: str
    shape: tuple[int, ...]  # global
    view: View  # from the parameter's local tensor to this rank's part of the piece; shares storage
    whole: bool = False  # it is all of the parameter, as it is; other views need contiguous tensors
    prefix: str = ""  # of its keys in the parameter's state
    placements: tuple[Any, ...] = ()  # on the parameter's mesh, for DTensors
    flat: tuple[FlatSlice, ...] = ()  # by rank, where the local part is a run of row-major elements
    stack: Stack | None = None


@dataclass(frozen=True, slots=True)
class _Block:
    """A matrix within a tensor: one of a stack, or a range of rows or columns, or all of it."""

    suffix: str
    shape: tuple[int, int]
    index: int | None = None  # in the stack
    split_number: int | None = None
    start: int = 0  # along the dimension that is split


def check_parts(parameter: Tensor, members: Sequence[FlatPart], rank: int, size: int) -> None:
    """Raises ValueError unless parts lie one after the other within a flat parameter of one of `size` ranks."""
    position = 0
    for part in members:
        run = part.slices[rank] if len(part.slices) == size else None
        if run is None or (run.stop > run.start and part.offset < position):
            raise ValueError(
                f"flat part {part.name!r}: {len(part.slices)} slices, this rank's from element {part.offset} "
                f"on; allowed: {size}, one per rank, from element {position} on, where the part before it ends"
            )
        position = max(position, part.offset + run.stop - run.start) if run.stop > run.start else position
    if parameter.ndim != 1 or position > parameter.numel():
        raise ValueError(
            f"flat parts: {position} elements for a parameter of shape {tuple(parameter.shape)}; allowed: one "
            "dimension, and no more elements than it has"
        )


def cut_parameter(name: str, parameter: Tensor, options: Mapping[str, Any], place: FlatPlace | None) -> list[Piece]:
    """The pieces of a parameter, in order; the same number on every rank.

    Args:
        options: of the parameter's group: `low_rank`, `higher_dims`, `split`, `split_dim`.
        place: what a flat tensor holds.

    Raises:
        ValueError: sizes that do not add up.
        LayoutError: a sharding under which a piece cannot be told from its neighbours.
    """
    if place is not None:
        rank = dist.get_rank(place.group)
        return [
            piece
            for part in place.parts
            for piece in _cut_flat(part.name, part.slices, rank, part.offset, options, f"{part.name}.")
        ]
    blocks = _blocks(name, tuple(parameter.shape), options)
    sharded = _sharded_dims(parameter)
    if options["low_rank"] and options["split"] is not None and blocks:
        stacked = blocks[0].index is not None
        dim = options["split_dim"] + int(stacked)
        if dim in sharded:
            if dim != 0:
                raise LayoutError(
                    f"parameter {name!r}: split along dimension {dim}, which is sharded; allowed: sharded along "
                    "another dimension" + ("" if stacked else " or dimension 0")
                )
            return _cut_sharded_rows(name, parameter, sharded[dim], options)
    if not blocks:
        placements = parameter.placements if isinstance(parameter, DTensor) else ()  # type: ignore[attr-defined]
        return [Piece(name, tuple(parameter.shape), _all, whole=True, placements=placements)]
    return [_piece(name, parameter, block, options, sharded) for block in blocks]


def _sharded_dims(parameter: Tensor) -> dict[int, int]:
    """Mesh axis by sharded dimension; axes of one rank shard nothing."""
    if not isinstance(parameter, DTensor):
        return {}
    mesh = parameter.device_mesh
    return {
        placement.dim: axis
        for axis, placement in enumerate(parameter.placements)
        if type(placement) is Shard and mesh.size(axis) > 1
    }


def _blocks(name: str, shape: tuple[int, ...], options: Mapping[str, Any]) -> list[_Block]:
    """The matrices of a tensor of this shape; none on the dense path."""
    if not options["low_rank"] or math.prod(shape) == 0 or len(shape) < 2:
        return []
    higher = options["higher_dims"]
    if len(shape) == 2:
        blocks = [_Block("", (shape[0], shape[1]))]
    elif higher == "flatten":
        blocks = [_Block("", (shape[0], math.prod(shape[1:])))]
    elif higher == "stack" and len(shape) == 3:
        blocks = [_Block(f"[{index}]", (shape[1], shape[2]), index) for index in range(shape[0])]
    else:
        return []
    if options["split"] is None:
        return blocks
    return [part for block in blocks for part in _split(name, block, options["split"], options["split_dim"])]


def _split(name: str, block: _Block, sizes: Sequence[int], dim: int) -> list[_Block]:
    if sum(sizes) != block.shape[dim]:
        raise ValueError(
            f"split: {list(sizes)} is not allowed for parameter {name!r} of shape {block.shape}; allowed: sizes that "
            f"add up to {block.shape[dim]}, its dimension {dim}"
        )
    parts, start = [], 0
    for number, size in enumerate(sizes):
        shape = (size, block.shape[1]) if dim == 0 else (block.shape[0], size)
        parts.append(_Block(f"{block.suffix}[{number}]", shape, block.index, number, start))
        start += size
    return parts


def _piece(
    name: str, parameter: Tensor, block: _Block, options: Mapping[str, Any], sharded: Mapping[int, int]
) -> Piece:
    """A block of a plain tensor or DTensor whose split dimension, if any, is whole."""
    placements = parameter.placements if isinstance(parameter, DTensor) else ()  # type: ignore[attr-defined]
    stack = None
    if block.index is not None:
        axis = sharded.get(0)
        start, stop = 0, parameter.shape[0]
        if axis is not None:
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            start, stop = chunk_range(parameter.shape[0], mesh.size(axis), mesh.get_local_rank(axis))
        stack = Stack(parameter.shape[0], block.index, start, stop, axis)
        if sum(type(each) is Shard and each.dim == 0 for each in placements) > 1:
            raise LayoutError(
                f"parameter {name!r}: its matrices are divided over several mesh dimensions, {placements}; allowed: one"
            )
        placements = tuple(map(_within_stack, placements))
    elif parameter.ndim > 2 and any(dim > 0 for dim in sharded):
        raise LayoutError(
            f"parameter {name!r} of shape {tuple(parameter.shape)}: flattened, but sharded along a dimension other "
            "than 0; allowed: dimension 0"
        )

    def view(local: Tensor) -> Tensor:
        if stack is not None:
            # An absent matrix has no part here.
            local = local[stack.index - stack.start] if stack.present else local.new_empty(local.shape[1:])
        elif local.ndim > 2:
            local = local.view(local.shape[0], math.prod(local.shape[1:]))
        if block.split_number is not None:
            local = local.narrow(options["split_dim"], block.start, block.shape[options["split_dim"]])
        return local

    if parameter.ndim == 2 and block.split_number is None:
        return Piece(name, block.shape, _all, whole=True, placements=placements)
    prefix = "" if block.split_number is None else f"{block.split_number}."
    return Piece(f"{name}{block.suffix}", block.shape, view, prefix=prefix, placements=placements, stack=stack)


def _within_stack(placement: Any) -> Any:
    """How a matrix of a stack is placed, given how the stack is."""
    if type(placement) is not Shard:
        return placement
    return Shard(placement.dim - 1) if placement.dim > 0 else Replicate()


def _cut_sharded_rows(name: str, parameter: Tensor, axis: int, options: Mapping[str, Any]) -> list[Piece]:
    """A matrix that is split along the dimension that is sharded: each rank has a run of elements of each piece."""
    assert isinstance(parameter, DTensor)
    mesh: DeviceMesh = parameter.device_mesh
    rows, width = parameter.shape[0], math.prod(parameter.shape[1:])
    ranges = (chunk_range(rows, mesh.size(axis), k) for k in range(mesh.size(axis)))
    slices = tuple(FlatSlice((rows, width), start * width, stop * width) for start, stop in ranges)
    pieces = _cut_flat(name, slices, mesh.get_local_rank(axis), 0, options, "")
    return [replace(piece, prefix=f"{number}.", placements=parameter.placements) for number, piece in enumerate(pieces)]


def _cut_flat(
    name: str, slices: Sequence[FlatSlice], rank: int, offset: int, options: Mapping[str, Any], prefix: str
) -> list[Piece]:
    """The pieces of a parameter of which each rank holds a run of row-major elements."""
    shape = slices[0].shape
    check_slices(shape, slices)
    blocks = _blocks(name, shape, options)
    if options["low_rank"] and options["split"] is not None and blocks and options["split_dim"] != 0:
        raise LayoutError(f"parameter {name!r}: split_dim={options['split_dim']} of a flat slice; allowed: 0")
    own = slices[rank]
    pieces = []
    for block in blocks:
        first = (block.index or 0) * math.prod(shape[1:]) + block.start * block.shape[1]
        runs = tuple(_within(each, first, block.shape) for each in slices)
        begin = offset + max(own.start, first) - own.start
        pieces.append(
            Piece(
                f"{name}{block.suffix}",
                block.shape,
                _run(begin, runs[rank].stop - runs[rank].start),
                prefix=f"{name}{block.suffix}." if prefix else "",
                flat=runs,
            )
        )
    if not blocks:
        run = _run(offset, own.stop - own.start)
        pieces.append(Piece(name, shape, run, prefix=prefix, flat=tuple(slices)))
    return pieces


def _within(run: FlatSlice, first: int, shape: tuple[int, int]) -> FlatSlice:
    """What a run holds of the block of `shape` that begins at element `first`."""
    size = math.prod(shape)
    start = min(max(run.start - first, 0), size)
    return FlatSlice(shape, start, max(start, min(run.stop - first, size)))


def _all(local: Tensor) -> Tensor:
    return local


def _run(begin: int, length: int) -> View:
    return lambda local: local.view(-1)[begin : begin + length]
