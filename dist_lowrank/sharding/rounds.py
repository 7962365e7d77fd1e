"""All communication of the optimizers: fused sums while rules run, exchanges before and gathers after.

A rule is a generator that says `total = yield partial` wherever it needs a sum over the ranks that hold the rows of
its matrix, and `result = yield OnOwner(...)` where one rank has to see them all. `run_rounds` advances the rules of
many matrices in lockstep; what they yield in one round travels in one all-reduce, or in two all-to-alls, per (process
group, dtype, device). Every rank of a group has to run the same rules in the same order, with empty tensors where it
holds no rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lowrank.sharding.layouts import Layout, chunk_range
from dist_lowrank.sharding.rule import OnOwner, Result, Rule
from dist_lowrank.sharding.turns import Turns


@dataclass(slots=True)
class Task(Generic[Result]):
    """A rule, and where the rows are over which its sums go."""

    rule: Rule[Result]
    layout: Layout


def run_rounds(tasks: Sequence[Task[Result]]) -> Turns[list[Result]]:
    """Runs all rules to their end; returns their results in order."""
    results: list[Any] = [None] * len(tasks)
    yielded: dict[int, Tensor | OnOwner] = {}

    def advance(index: int, answer: Tensor | None) -> None:
        try:
            rule = tasks[index].rule
            yielded[index] = next(rule) if answer is None else rule.send(answer)
        except StopIteration as stop:
            results[index] = stop.value

    for index in range(len(tasks)):
        advance(index, None)
    while yielded:
        waiting, yielded = yielded, {}
        partials = {index: each for index, each in waiting.items() if isinstance(each, Tensor)}
        requests = {index: each for index, each in waiting.items() if isinstance(each, OnOwner)}
        totals = yield from _sum_fused([(tasks[index].layout.group, each) for index, each in partials.items()])
        computed = yield from _on_owners([(tasks[index].layout, each) for index, each in requests.items()])
        answers = dict(zip([*partials, *requests], [*totals, *computed], strict=True))
        del partials, requests, totals, computed
        for index in waiting:
            advance(index, answers.pop(index))
    return results


def _sum_fused(requests: Sequence[tuple[dist.ProcessGroup | None, Tensor]]) -> Turns[list[Tensor]]:
    """Sums each tensor over its group, one all-reduce per (group, dtype, device)."""
    totals = [partial for _, partial in requests]
    fused: dict[tuple[Any, torch.dtype, torch.device], list[int]] = {}
    for index, (group, partial) in enumerate(requests):
        if group is not None:
            fused.setdefault((group, partial.dtype, partial.device), []).append(index)
    if not fused:
        return totals
    buffers = [torch.cat([totals[index].reshape(-1) for index in members]) for members in fused.values()]
    yield [
        dist.all_reduce(buffer, group=group, async_op=True)
        for buffer, (group, _, _) in zip(buffers, fused, strict=True)
    ]
    for buffer, members in zip(buffers, fused.values(), strict=True):
        sizes = [totals[index].numel() for index in members]
        for index, total in zip(members, torch.split(buffer, sizes), strict=True):
            totals[index] = total.view(totals[index].shape)
    return totals


def sum_in_place(buffer: Tensor, groups: Sequence[dist.ProcessGroup]) -> None:
    """Sums a tensor over groups, one after the other."""
    for group in groups:
        dist.all_reduce(buffer, group=group)


def work(rows: int, columns: int) -> float:
    """What a matrix product costs that makes a matrix from itself and its Gram matrix, in relation to others."""
    return rows * columns * min(rows, columns)


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """Which rank does each of several pieces of work: the dearest first, to the rank with the least."""
    loads, chosen = [0.0] * ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda each: -costs[each]):
        chosen[index] = min(range(ranks), key=loads.__getitem__)
        loads[chosen[index]] += costs[index]
    return chosen


def _on_owners(requests: Sequence[tuple[Layout, OnOwner]]) -> Turns[list[Tensor]]:
    """Sends all rows of each matrix to its owner, computes there, and returns to each rank its rows."""
    results = [request.rows for _, request in requests]
    channels: dict[tuple[Any, torch.dtype, torch.device], list[int]] = {}
    for index, (layout, request) in enumerate(requests):
        channels.setdefault((layout.group, request.rows.dtype, request.rows.device), []).append(index)
    for (group, _, _), members in channels.items():
        layouts, matrices = [requests[index][0] for index in members], [requests[index][1] for index in members]
        computed = yield from _computed(layouts, matrices, group)
        for index, result in zip(members, computed, strict=True):
            results[index] = result
    return results


def _computed(
    layouts: Sequence[Layout], requests: Sequence[OnOwner], group: dist.ProcessGroup | None
) -> Turns[list[Tensor]]:
    if group is None:
        return _in_batches([request.rows for request in requests], [request.compute for request in requests])
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    shapes = [(layout.form.rows, request.rows.shape[1]) for layout, request in zip(layouts, requests, strict=True)]
    owner = owners([work(*shape) for shape in shapes], ranks)
    mine = [index for index, each in enumerate(owner) if each == rank]
    nothing = [(0, 0)] * ranks
    owned = [layout.owned_by_rank() for layout in layouts]
    arrived = yield from exchange(
        [
            _to_one(request.rows[layout.owned], each, ranks)
            for layout, request, each in zip(layouts, requests, owner, strict=True)
        ],
        [_heights(owned[index] if owner[index] == rank else nothing, shapes[index][1]) for index in range(len(owner))],
        group,
    )
    whole = [torch.cat(arrived[index]) for index in mine]
    del arrived
    made = dict(zip(mine, _in_batches(whole, [requests[index].compute for index in mine]), strict=True))
    del whole
    held = [layout.rows_by_rank() for layout in layouts]
    returned = yield from exchange(
        [
            [made[index][start:stop] for start, stop in held[index]] if index in made else [request.rows[:0]] * ranks
            for index, request in enumerate(requests)
        ],
        [
            _heights([held[index][rank] if k == owner[index] else (0, 0) for k in range(ranks)], shapes[index][1])
            for index in range(len(owner))
        ],
        group,
    )
    return [pieces[each] for pieces, each in zip(returned, owner, strict=True)]


def _to_one(rows: Tensor, owner: int, ranks: int) -> list[Tensor]:
    return [rows if rank == owner else rows[:0] for rank in range(ranks)]


def _heights(ranges: Sequence[tuple[int, int]], columns: int) -> list[tuple[int, int]]:
    """The shapes of blocks of rows."""
    return [(stop - start, columns) for start, stop in ranges]


def _in_batches(matrices: Sequence[Tensor], computes: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
    """Each matrix computed; those of one shape and one function in one call."""
    batches: dict[tuple[torch.Size, Callable[[Tensor], Tensor]], list[int]] = {}
    for index, (matrix, compute) in enumerate(zip(matrices, computes, strict=True)):
        batches.setdefault((matrix.shape, compute), []).append(index)
    results = list(matrices)
    for (_, compute), members in batches.items():
        stacked = compute(torch.stack([matrices[index] for index in members]))
        for index, result in zip(members, stacked, strict=True):
            results[index] = result
    return results


def gather_rows(blocks: Sequence[tuple[Tensor, int]], group: dist.ProcessGroup) -> Turns[list[Tensor]]:
    """Gathers row blocks of several matrices in one collective.

    Args:
        blocks: per matrix, this rank's rows (l, r) and the number of rows of all ranks together, L; blocks are cut as
            `torch.chunk` cuts. All of one dtype and device.

    Returns:
        Per matrix, all rows (L, r).
    """
    world_size = dist.get_world_size(group)
    padded = []
    for block, rows in blocks:
        largest = -(-rows // world_size)
        padded.append(torch.nn.functional.pad(block, (0, 0, 0, largest - block.shape[0])).reshape(-1))
    sent = torch.cat(padded)
    received = [torch.empty_like(sent) for _ in range(world_size)]
    yield [dist.all_gather(received, sent, group=group, async_op=True)]
    sizes = [part.numel() for part in padded]
    pieces = [torch.split(part, sizes) for part in received]  # [rank][matrix]
    gathered = []
    for index, (block, rows) in enumerate(blocks):
        ranges = [chunk_range(rows, world_size, rank) for rank in range(world_size)]
        parts = [
            pieces[rank][index].view(-1, block.shape[1])[: stop - start] for rank, (start, stop) in enumerate(ranges)
        ]
        gathered.append(torch.cat(parts))
    return gathered


def exchange(
    outgoing: Sequence[Sequence[Tensor]], incoming_shapes: Sequence[Sequence[tuple[int, ...]]], group: dist.ProcessGroup
) -> Turns[list[list[Tensor]]]:
    """Sends pieces of several matrices between all ranks in one all-to-all.

    Args:
        outgoing: per matrix, what goes to each rank. All of one dtype and device.
        incoming_shapes: per matrix, the shape of what comes from each rank.

    Returns:
        Per matrix, what came from each rank.
    """
    world_size = dist.get_world_size(group)
    sent_by_rank = [[pieces[rank].reshape(-1) for pieces in outgoing] for rank in range(world_size)]
    sent = torch.cat([piece for pieces in sent_by_rank for piece in pieces])
    sizes = [[math.prod(shapes[rank]) for shapes in incoming_shapes] for rank in range(world_size)]
    received = sent.new_empty(sum(map(sum, sizes)))
    work = dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=list(map(sum, sizes)),
        input_split_sizes=[sum(piece.numel() for piece in pieces) for pieces in sent_by_rank],
        group=group,
        async_op=True,
    )
    yield [work]
    pieces = iter(torch.split(received, [size for by_matrix in sizes for size in by_matrix]))
    arrived: list[list[Tensor]] = [[] for _ in outgoing]
    for rank in range(world_size):
        for matrix, shapes in enumerate(incoming_shapes):
            arrived[matrix].append(next(pieces).view(shapes[rank]))
    return arrived


def ranks_that_differ(values: Tensor, group: dist.ProcessGroup) -> list[tuple[int, int]]:
    """Compares integers that should be equal on all ranks; the same answer on each.

    Args:
        values: (k,), int64.

    Returns:
        Pairs (rank within the group, position) that differ from rank 0.
    """
    received = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, values, group=group)
    return [(rank, position) for rank, position in (torch.stack(received) != received[0]).nonzero().tolist()]
