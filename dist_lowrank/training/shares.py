"""How much of a parameter and of its state each rank holds: closed forms, for all ranks at once.

Thousands of ranks differ little, but which of them hold a row more, or nothing, depends on every size; so each figure
here is an array with an entry per rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy
from numpy.typing import NDArray

from dist_lowrank.config import ConfigError
from dist_lowrank.config.schema import RunConfig
from dist_lowrank.optim.blocks import Blocks
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.sharding.layouts import LayoutError, TallForm
from dist_lowrank.strategies import shard_count, shard_dimension
from dist_lowrank.training.planned_parameters import PlannedParameter, by_group

Counts = NDArray[numpy.int64]  # one per rank
Bytes = dict[str, Counts]  # by cause

COUNTER_BYTES = 4  # of steps, one per parameter or part of one


@dataclass(frozen=True, slots=True)
class Share:
    """What the ranks hold of one parameter."""

    elements: Counts  # of the weight
    stored: Counts  # with the padding that it is stored with
    rows: Counts  # of the tall form whose state is kept; 0 on the dense path


def evenly(length: int, parts: int, ranks: Counts) -> Counts:
    """Of `length` things in blocks of ceil(length / parts), as `torch.chunk` cuts, how many are in each rank's."""
    size = -(-length // parts)
    return numpy.clip(length - ranks * size, 0, size)


def shares(
    config: RunConfig, parameters: Sequence[PlannedParameter], world_size: int
) -> Iterator[tuple[PlannedParameter, Share, int]]:
    """Parameters with what ranks hold of them; those of which they hold the same come once, with their number."""
    if config.strategy.zero_stage:
        yield from ((parameter, share, 1) for parameter, share in share_of_each(config, parameters, world_size))
        return
    alike = sorted(enumerate(parameters), key=lambda each: (_kind(each[1]), each[0]))
    kinds = [list(members) for _, members in groupby((parameter for _, parameter in alike), key=_kind)]
    first_of_each = [members[0] for members in kinds]
    for members, (first, share) in zip(kinds, share_of_each(config, first_of_each, world_size), strict=True):
        yield first, share, len(members)


def share_of_each(
    config: RunConfig, parameters: Sequence[PlannedParameter], world_size: int
) -> Iterator[tuple[PlannedParameter, Share]]:
    """Every parameter with what ranks hold of it.

    Raises:
        ConfigError: the copies of the model would not be of equal size.
    """
    stage, shards = config.strategy.zero_stage, shards_of(config, world_size)
    if stage:
        yield from shares_under_zero(parameters, stage, world_size)
    elif shards is None:
        yield from ((each, share_of_copy(each, world_size)) for each in parameters)
    else:
        yield from ((each, share_of_shard(each, shards, world_size)) for each in parameters)


def tensor_bytes(spec: StateTensor, rows: Counts) -> Counts:
    """Of a tensor of state, on ranks that have it for so many rows."""
    return spec.columns * spec.dtype.itemsize * (rows if spec.sharded else numpy.full_like(rows, spec.rows or 1))


def _kind(parameter: PlannedParameter) -> tuple[object, ...]:
    """What parameters have in common that take as much memory; turns of blocks differ by position."""
    position = parameter.recipe.position if isinstance(parameter.recipe, Blocks) else 0
    form = parameter.form
    path = (False, 0, False) if form is None else (True, form.rank, form.transposed)
    return (parameter.group, parameter.shape, path, str(parameter.tensor.dtype), position)


def shards_of(config: RunConfig, world_size: int) -> int | None:
    """Ranks over which torch cuts one copy of the model; None where the optimizer sees whole copies.

    Raises:
        ConfigError: the copies would not be of equal size.
    """
    if config.strategy.name == "ddp" or config.strategy.zero_stage is not None:
        return None
    try:
        return shard_count(config.strategy, world_size)
    except LayoutError as error:
        raise ConfigError(str(error)) from error


def share_of_copy(parameter: PlannedParameter, world_size: int) -> Share:
    """Under ddp and zero0: copies divide the work on matrices, and their state."""
    form, elements = parameter.form, parameter.tensor.numel()
    everything = numpy.full(world_size, elements, dtype=numpy.int64)
    ranks: Counts = numpy.arange(world_size, dtype=numpy.int64)
    return Share(everything, everything, _no_rows(world_size) if form is None else evenly(form.rows, world_size, ranks))


def share_of_shard(parameter: PlannedParameter, shards: int, world_size: int) -> Share:
    """Under fsdp and hsdp, where neighbouring ranks hold the shards of one copy."""
    shape, form = parameter.shape or (1,), parameter.form
    shard: Counts = numpy.arange(world_size, dtype=numpy.int64) % shards
    dimension = 0 if form is None else shard_dimension(form, shards)
    width = math.prod(shape) // shape[dimension]
    elements = evenly(shape[dimension], shards, shard) * width
    stored = numpy.full(world_size, -(-shape[dimension] // shards) * width, dtype=numpy.int64)
    return Share(elements, stored, _no_rows(world_size) if form is None else evenly(form.rows, shards, shard))


def shares_under_zero(
    parameters: Sequence[PlannedParameter], stage: int, world_size: int
) -> Iterator[tuple[PlannedParameter, Share]]:
    """Under DeepSpeed's stages 1 to 3, which cut as `dist_lowrank.training.zero_layout` says."""
    ranks: Counts = numpy.arange(world_size + 1, dtype=numpy.int64)
    for members in by_group(parameters):
        total = sum(each.tensor.numel() for each in members)
        start, length = 0, math.ceil(total / (2 * world_size)) * 2
        for parameter in members:
            elements = parameter.tensor.numel()
            if stage == 3:
                start, length = 0, math.ceil(elements / world_size)
            edges = numpy.clip(ranks * length - start, 0, elements)
            first, last = edges[:-1], edges[1:]
            stored = numpy.full(world_size, length, dtype=numpy.int64) if stage == 3 else last - first
            yield parameter, Share(last - first, stored, _rows_of_flat(parameter.form, first, last, world_size))
            start += elements


def flat_length(members: Sequence[PlannedParameter], stage: int, world_size: int) -> int:
    """Elements of one rank's flat tensor of a parameter group, with padding."""
    if stage == 3:
        return sum(-(-each.tensor.numel() // world_size) for each in members)
    return math.ceil(sum(each.tensor.numel() for each in members) / (2 * world_size)) * 2


def _rows_of_flat(form: TallForm | None, first: Counts, last: Counts, world_size: int) -> Counts:
    """Rows that the elements `first` to `last` of a row-major matrix touch, or an even block where they are columns."""
    if form is None:
        return _no_rows(world_size)
    if form.transposed:
        return evenly(form.rows, world_size, numpy.arange(world_size, dtype=numpy.int64))
    width = form.shape[1]
    return numpy.where(last > first, -(-last // width) - first // width, 0)


def _no_rows(world_size: int) -> Counts:
    return numpy.zeros(world_size, dtype=numpy.int64)
