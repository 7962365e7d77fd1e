"""All communication of the optimizers: fused sums while rules run, exchanges before and gathers after.

A rule is a generator that says `total = yield partial` wherever it needs a sum over the ranks that hold the rows of
its matrix. `run_rounds` advances the rules of many matrices in lockstep; what they yield in one round travels in one
all-reduce per (process group, dtype, device). Every rank of a group has to run the same rules in the same order, with
empty partial sums where it holds no rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lowrank.sharding.layouts import chunk_range
from dist_lowrank.sharding.rule import Result, Rule


@dataclass(slots=True)
class Task(Generic[Result]):
    """A rule and the process group over which its sums go (None: this rank alone)."""

    rule: Rule[Result]
    group: dist.ProcessGroup | None


def run_rounds(tasks: Sequence[Task[Result]]) -> list[Result]:
    """Runs all rules to their end; returns their results in order."""
    results: list[Any] = [None] * len(tasks)
    partials: dict[int, Tensor] = {}

    def advance(index: int, total: Tensor | None) -> None:
        try:
            rule = tasks[index].rule
            partials[index] = next(rule) if total is None else rule.send(total)
        except StopIteration as stop:
            results[index] = stop.value

    for index in range(len(tasks)):
        advance(index, None)
    while partials:
        waiting, partials = partials, {}
        totals = _sum_fused([(tasks[index].group, partial) for index, partial in waiting.items()])
        for index, total in zip(waiting, totals, strict=True):
            advance(index, total)
    return results


def _sum_fused(requests: Sequence[tuple[dist.ProcessGroup | None, Tensor]]) -> list[Tensor]:
    """Sums each tensor over its group, one all-reduce per (group, dtype, device)."""
    totals = [partial for _, partial in requests]
    fused: dict[tuple[Any, torch.dtype, torch.device], list[int]] = {}
    for index, (group, partial) in enumerate(requests):
        if group is not None:
            fused.setdefault((group, partial.dtype, partial.device), []).append(index)
    for (group, _, _), members in fused.items():
        buffer = torch.cat([totals[index].reshape(-1) for index in members])
        dist.all_reduce(buffer, group=group)
        sizes = [totals[index].numel() for index in members]
        for index, total in zip(members, torch.split(buffer, sizes), strict=True):
            totals[index] = total.view(totals[index].shape)
    return totals


def gather_rows(blocks: Sequence[tuple[Tensor, int]], group: dist.ProcessGroup) -> list[Tensor]:
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
    dist.all_gather(received, sent, group=group)
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
) -> list[list[Tensor]]:
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
    dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=list(map(sum, sizes)),
        input_split_sizes=[sum(piece.numel() for piece in pieces) for pieces in sent_by_rank],
        group=group,
    )
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
