"""What a step sends, worked out without sending anything: the collectives of `dist_lowrank.optim.wave`, from layouts.

Layouts are plain data and rules say how many numbers they sum, so the list follows from them: per wave one call per
process group, dtype and device for the rows that are fetched, for each round of sums, for coefficients and for
updates. Tests compare it with what real steps send, under every layout.

Counted is what the optimizer sends. What DDP and FSDP2 send for gradients and weights is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lowrank.optim.binding import BoundMatrix, BoundParameter
from dist_lowrank.optim.columns import PreviousColumns
from dist_lowrank.optim.dense import gradient_dtype
from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.low_rank import LowRank
from dist_lowrank.optim.recipe import Recipe, Sum, Whole
from dist_lowrank.optim.shared_dictionary import kept_bytes, learning_waves
from dist_lowrank.optim.subspace import Possible
from dist_lowrank.optim.wave import Job, cut_waves
from dist_lowrank.sharding.exchanged import Delivered, Exchanged
from dist_lowrank.sharding.layouts import local
from dist_lowrank.sharding.rounds import owners, work
from dist_lowrank.sharding.transport import sent_dtype

PURPOSES = (
    "agreement",
    "rows",
    "traces",
    "dictionaries",
    "sums",
    "whole matrices",
    "coefficients",
    "updates",
    "verification",
)


@dataclass(frozen=True, slots=True)
class Collective:
    """One call, as this rank makes it."""

    purpose: str
    operation: str  # all_reduce, all_gather, all_to_all
    dtype: torch.dtype
    elements: int  # of the tensor that this rank hands over

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


def collectives_of_step(
    optimizer: LowRankOptimizer,
    *,
    refresh: bool = True,
    step: int | None = None,
    verification: bool = False,
    dictionaries: bool = False,
    scores_known: bool = False,
    at_most: bool = False,
) -> list[Collective]:
    """The collectives of one step in which every parameter has a gradient, wave by wave; two waves take turns.

    Left out are the comparison of replicas at the first step, and those that a gradient needs whose DTensor is not
    placed as its parameter's.

    Args:
        refresh: every matrix chooses its columns at this step, not for the first time; otherwise those alone that do so
            at each.
        step: its number, which says of each matrix whether it chooses (with `refresh_stagger`, some do), and whether
            for the first time, in place of `refresh`.
        at_most: with the further sums of each SVD whose gradient has a lower rank than the subspace: what a step sends
            if all have; if some have, it sends no more.
        verification: the columns of all matrices are compared at this step (see `verify_every`).
        dictionaries: those that matrices share change at this step, at which every matrix chooses.
        scores_known: ranks have summed the scores of `selection="previous"` with the gradients (`gradient_sync`).
    """
    bound, jobs = [parameter for members in optimizer.bind() for parameter in members], jobs_of(optimizer)
    collectives = list(_of_agreement(bound)) if optimizer.agree_on_gradients else []
    workspace_bytes = optimizer.workspace_bytes
    if dictionaries:
        collectives += collectives_of_dictionaries(optimizer)
        refresh, step = True, None
        workspace_bytes -= kept_bytes(matrix for matrix, _ in jobs)
    for wave in cut_waves(jobs, workspace_bytes):
        present = [(matrix, recipe) for matrix, recipe in wave if matrix.present]
        collectives += _of_wave(present, [_rounds(*job, refresh, step, scores_known, at_most) for job in present])
    if verification:
        collectives += _of_verification([matrix for matrix, _ in jobs])
    return collectives


def _of_agreement(parameters: Sequence[BoundParameter]) -> Iterator[Collective]:
    """A byte per parameter and group; two where replicas have to be alike."""
    for replicated, size in ((False, 1), (True, 2)):
        groups = [group for bound in parameters for group, replicas in bound.sharers if replicas == replicated]
        for group in dict.fromkeys(groups):
            yield Collective("agreement", "all_reduce", torch.uint8, size * groups.count(group))


def collectives_of_dictionaries(optimizer: LowRankOptimizer) -> list[Collective]:
    """Those that a step in which shared dictionaries change has beside what it has anyway."""
    jobs = [(matrix, recipe) for matrix, recipe in jobs_of(optimizer) if matrix.role is not None]
    workspace_bytes = optimizer.workspace_bytes - kept_bytes(matrix for matrix, _ in jobs)
    collectives: list[Collective] = []
    for roles, waves in learning_waves(jobs, workspace_bytes):
        for wave in waves:
            matrices = [matrix for matrix, _ in wave if matrix.present]
            fetched = [_fetched(matrix, matrix.dtype) for matrix in matrices if matrix.layout.exchanges]
            collectives += _fused("rows", "all_to_all", fetched)
            summed = [(matrix, 1, matrix.dtype) for matrix in matrices if matrix.layout.group is not None]
            collectives += _fused("traces", "all_reduce", summed)
        by_channel: dict[tuple[Any, ...], int] = {}
        for role in roles:
            by_channel[role.channel] = by_channel.get(role.channel, 0) + role.n**2
        for (groups, dtype, _), elements in by_channel.items():
            collectives += [Collective("dictionaries", "all_reduce", dtype, elements)] * len(groups)
    return collectives


def jobs_of(optimizer: LowRankOptimizer) -> list[Job]:
    """All its matrices, each with its recipe, in the order of its groups."""
    return [
        job
        for group, members in zip(optimizer.param_groups, optimizer.bind(), strict=True)
        for recipe in [optimizer.recipe(group)]
        for parameter in members
        for job in optimizer.jobs(recipe, parameter)
    ]


def _rounds(
    matrix: BoundMatrix, recipe: Recipe, refresh: bool, step: int | None, scores_known: bool, at_most: bool
) -> list[Sum | Whole]:
    form = matrix.layout.form
    if scores_known and isinstance(recipe, LowRank) and isinstance(recipe.subspace, PreviousColumns):
        return []
    if step == 1:
        rounds = recipe.first_rounds(form)
    else:
        rounds = recipe.rounds(form, refresh if step is None else recipe.refreshes(step))
    made: list[Sum | Whole] = []
    for each in rounds:
        if isinstance(each, int) or (at_most and isinstance(each, Possible)):
            made.append(Sum(each if isinstance(each, int) else each.elements, matrix.dtype))
        elif not isinstance(each, Possible):
            made.append(each)
    return made


def _of_wave(wave: Sequence[Job], rounds: Sequence[Sequence[Sum | Whole]]) -> Iterator[Collective]:
    """With what the rule of each matrix yields."""
    matrices = [matrix for matrix, _ in wave]
    operands = [recipe.operands(matrix.dtype) for matrix, recipe in wave]  # the dtype of rows and of directions
    fetched = [
        _fetched(matrix, dtype) for matrix, dtype in zip(matrices, operands, strict=True) if matrix.layout.exchanges
    ]
    yield from _fused("rows", "all_to_all", fetched)
    for sizes in zip_longest(*rounds):  # by round; None: the rule has ended
        shared = [
            (matrix, size) for matrix, size in zip(matrices, sizes, strict=True) if matrix.layout.group is not None
        ]
        sums = [(matrix, size.elements, size.dtype) for matrix, size in shared if isinstance(size, Sum)]
        yield from _fused("sums", "all_reduce", sums)
        yield from _to_owners([(matrix, size) for matrix, size in shared if isinstance(size, Whole)])
    deliveries = [matrix.layout.delivery(recipe.full_rows) for matrix, recipe in wave]
    gathered = [
        # Short blocks are padded.
        (matrix, matrix.layout.largest_block * recipe.columns_delivered(matrix.layout.form), dtype)
        for (matrix, recipe), dtype, delivery in zip(wave, operands, deliveries, strict=True)
        if delivery == "coefficients"
    ]
    yield from _fused("coefficients", "all_gather", gathered)
    returned = [
        (matrix, _returned(matrix), matrix.dtype)
        for matrix, delivery in zip(matrices, deliveries, strict=True)
        if delivery == "rows"
    ]
    yield from _fused("updates", "all_to_all", returned)


def _to_owners(matrices: Sequence[tuple[BoundMatrix, Whole]]) -> Iterator[Collective]:
    """The two exchanges of a round in which owners get whole matrices: there, and back."""
    by_channel: dict[Any, list[tuple[BoundMatrix, int]]] = {}
    for matrix, whole in matrices:
        channel = (matrix.layout.group, whole.dtype or matrix.dtype, local(matrix.parameter).device)
        by_channel.setdefault(channel, []).append((matrix, whole.columns))
    for (group, dtype, _), members in by_channel.items():
        rank, sent, returned = dist.get_rank(group), 0, 0
        shapes = [(matrix.layout.form.rows, columns) for matrix, columns in members]
        owner = owners([work(*shape) for shape in shapes], dist.get_world_size(group))
        for (matrix, columns), owned_by in zip(members, owner, strict=True):
            start, stop = matrix.layout.owned_by_rank()[rank]
            sent += (stop - start) * columns
            if owned_by == rank:
                returned += sum(last - first for first, last in matrix.layout.rows_by_rank()) * columns
        yield Collective("whole matrices", "all_to_all", dtype, sent)
        yield Collective("whole matrices", "all_to_all", dtype, returned)


def _of_verification(matrices: Sequence[BoundMatrix]) -> Iterator[Collective]:
    by_group: dict[dist.ProcessGroup, int] = {}
    for matrix in matrices:
        if matrix.layout.group is not None and matrix.present:
            by_group[matrix.layout.group] = by_group.get(matrix.layout.group, 0) + 1
    for count in by_group.values():
        yield Collective("verification", "all_gather", torch.int64, count)


def _fused(purpose: str, operation: str, sent: Sequence[tuple[BoundMatrix, int, torch.dtype]]) -> Iterator[Collective]:
    """One collective per process group, dtype and device, from the elements that each matrix puts in it."""
    totals: dict[tuple[dist.ProcessGroup | None, torch.dtype, torch.device], int] = {}
    for matrix, elements, dtype in sent:
        channel = (matrix.layout.group, dtype, local(matrix.parameter).device)
        totals[channel] = totals.get(channel, 0) + elements
    for (_, dtype, _), total in totals.items():
        yield Collective(purpose, operation, dtype, total)


def _fetched(matrix: BoundMatrix, dtype: torch.dtype) -> tuple[BoundMatrix, int, torch.dtype]:
    """Elements of its gradient that this rank sends so that rows become whole, wanted in `dtype`; and in which."""
    gradient = torch.empty_like(local(matrix.parameter), device="meta", memory_format=torch.contiguous_format)
    sent = sent_dtype(gradient_dtype(matrix.parameter), dtype)
    if not isinstance(matrix.layout, Exchanged):
        return matrix, 0, sent
    return matrix, _elements(matrix.layout.outgoing(matrix.piece.view(gradient))), sent


def _returned(matrix: BoundMatrix) -> int:
    """Elements of the updated rows that this rank sends back."""
    layout = matrix.layout
    if not isinstance(layout, Delivered):
        return 0
    return _elements(layout.outgoing_update(torch.empty(layout.stop - layout.start, layout.form.n, device="meta")))


def _elements(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
