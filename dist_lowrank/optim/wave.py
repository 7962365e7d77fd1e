"""One wave: matrices that are updated together, in lockstep.

fetch rows        where a rank does not hold them whole: one all-to-all
run the rules     one all-reduce per round
deliver           where rows were divided: coefficients, L x r, or lifted rows
apply             W <- (1 - lr wd) W - lr scale direction D[:, I]^T
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lowrank.dictionaries import DictionaryCache
from dist_lowrank.optim.binding import BoundMatrix
from dist_lowrank.optim.capturable import LATER_STEP
from dist_lowrank.optim.dense import local_gradients
from dist_lowrank.optim.recipe import SCALES, Recipe, Update
from dist_lowrank.optim.rounding import RandomBits, RowNoise, store_weight
from dist_lowrank.optim.subspace import Place
from dist_lowrank.optim.transient import held_bytes, in_flight_bytes, owned_bytes, sent_bytes, whole_columns
from dist_lowrank.sharding.exchanged import Delivered, FlatRows
from dist_lowrank.sharding.layouts import TallForm, local
from dist_lowrank.sharding.rounds import Task, ranks_that_differ, run_rounds
from dist_lowrank.sharding.transport import exchange_updates, fetch_rows, gather_coefficients
from dist_lowrank.sharding.turns import Activity, Turns, at_once, finish

Job = tuple[BoundMatrix, Recipe]

# Waves that are there only so that one computes while another sends: all but a quarter of what is sent can be hidden,
# and a wave's own latency is little beside the time that this many bytes take.
MOST_WAVES = 4
LEAST_SENT_BYTES = 4 * 2**20  # by a rank


def cut_waves(jobs: Sequence[Job], workspace_bytes: int) -> Iterator[list[Job]]:
    """Cuts the work so that what a wave holds fits the workspace, at least one matrix each.

    Matrices go in lockstep for what ranks send each other, or for what is computed in one call. Where there is neither
    the pieces of a parameter, which share its gradient, are a wave, so that caches still hold what the weights need.
    Decided from what all ranks know, so all cut alike.

    Of what ranks send each other, two waves fit the workspace if one does not take all: while the collectives of one
    are under way, the other computes. Where one would take all there are several only if they send much.
    """
    together: dict[Tensor | str, list[Job]] = {}
    in_one_call: dict[tuple[int, TallForm], bool] = {}  # by recipe and form
    for matrix, recipe in jobs:
        kind = (id(recipe), matrix.layout.form)
        if kind not in in_one_call:
            in_one_call[kind] = whole_columns(recipe, matrix.layout.form) > 0
        sends = matrix.layout.group is not None
        key = "sent" if sends else "in one call" if in_one_call[kind] else matrix.parameter
        together.setdefault(key, []).append((matrix, recipe))
    for key, members in together.items():
        if len(members) == 1:  # a wave, whatever it holds
            yield members
            continue
        held = [held_bytes(*job) for job in members]
        sent = [sent_bytes(*job) for job in members] if key == "sent" else [0] * len(members)
        most_held_bytes, enough_sent_bytes = workspace_bytes, math.inf
        if key == "sent":
            most_held_bytes, enough_sent_bytes = _for_overlap(members, held, sum(sent), workspace_bytes)
        wave: list[Job] = []
        wave_held_bytes = wave_sent_bytes = 0
        for job, job_held_bytes, job_sent_bytes in zip(members, held, sent, strict=True):
            if wave and (wave_held_bytes + job_held_bytes > most_held_bytes or wave_sent_bytes >= enough_sent_bytes):
                yield wave
                wave, wave_held_bytes, wave_sent_bytes = [], 0, 0
            wave.append(job)
            wave_held_bytes += job_held_bytes
            wave_sent_bytes += job_sent_bytes
        yield wave


def _for_overlap(
    members: Sequence[Job], held: Sequence[int], all_sent_bytes: int, workspace_bytes: int
) -> tuple[int, float]:
    """What a wave may hold at most, and what it sends at least before the next one begins.

    Matrices that owners compute are cut only where each rank has two in each wave: else some would wait for others.
    """
    owned = [owned_bytes(*job) for job in members]
    at_least = 2 * members[0][0].layout.group_size if any(owned) else 0  # matrices
    most_held_bytes = workspace_bytes
    if sum(held) > workspace_bytes:
        half_bytes = workspace_bytes // 2 - max(owned)
        most_held_bytes = half_bytes if half_bytes >= at_least * max(held) else workspace_bytes
    count = min(MOST_WAVES, all_sent_bytes // LEAST_SENT_BYTES, len(members) // max(1, at_least))
    return most_held_bytes, all_sent_bytes / count if count > 1 else math.inf


@contextmanager
def no_autocast(device_types: Iterable[str]) -> Iterator[None]:
    """The update's arithmetic is its own affair, also when `step` is called inside autocast."""
    with ExitStack() as stack:
        for device_type in device_types:
            if device_type in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def count_steps(jobs: Sequence[Job], state: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    """Adds 1 to the step counters of all matrices to be updated; those of a stack share theirs."""
    counters = [state[matrix.parameter][f"{matrix.piece.prefix}step"] for matrix, _ in jobs]
    distinct = {id(counter): counter for counter in counters}
    if distinct:
        torch._foreach_add_(list(distinct.values()), 1)


def update_waves(
    waves: Iterable[Sequence[Job]], state: Mapping[Tensor, Mapping[str, Tensor]], cache: DictionaryCache
) -> list[Activity]:
    """Updates the matrices of all waves: an activity for each whose matrices ranks share, one for all others.

    These come last, as they wait for nothing and so fill the time in which what was sent is under way.
    """
    shared: list[Sequence[Job]] = []
    alone: list[Sequence[Job]] = []
    for wave in waves:
        (alone if wave[0][0].layout.group is None else shared).append(wave)

    def update_alone() -> None:
        for wave in alone:
            finish(_turns_of_update(wave, state, cache))

    activities = [update_wave(wave, state, cache) for wave in shared]
    if alone:
        activities.append(Activity(at_once(update_alone), lambda: max(map(in_flight_bytes, alone))))
    return activities


def update_wave(wave: Sequence[Job], state: Mapping[Tensor, Mapping[str, Tensor]], cache: DictionaryCache) -> Activity:
    """Updates the matrices of a wave. Collective over the ranks that share them.

    Of a stack that is divided ranks have different matrices, whose rules may yield a different number of times; so
    such a wave waits for its collectives in one turn.
    """
    turns = _turns_of_update(wave, state, cache)
    if any(matrix.piece.stack is not None and matrix.piece.stack.mesh_axis is not None for matrix, _ in wave):
        turns = at_once(partial(finish, turns))
    return Activity(turns, partial(in_flight_bytes, wave))


def _turns_of_update(
    wave: Sequence[Job], state: Mapping[Tensor, Mapping[str, Tensor]], cache: DictionaryCache
) -> Turns[None]:
    # Also of matrices that other ranks hold: this can be collective.
    parts = local_gradients([(matrix.parameter, matrix.piece) for matrix, _ in wave])
    gradients = [matrix.piece.view(part) for (matrix, _), part in zip(wave, parts, strict=True) if matrix.present]
    wave = [(matrix, recipe) for matrix, recipe in wave if matrix.present]
    layouts = [matrix.layout for matrix, _ in wave]
    operands = [recipe.operands(matrix.dtype) for matrix, recipe in wave]
    rows = yield from fetch_rows(layouts, gradients, operands)
    tasks, random, deliveries = [], [], []
    for index, (matrix, recipe) in enumerate(wave):
        own = matrix.state(state[matrix.parameter])
        step, layout = LATER_STEP if recipe.capturable else int(own["step"]), matrix.layout
        bits, device = RandomBits(recipe.seed, matrix.name, step), rows[index].device
        counter = own["step"] if own["step"].device == device else None
        place = place_of(matrix, device, cache, bits, counter, alone=len(wave) == 1 and layout.group is None)
        matrix.scores = None  # used up
        rule = recipe.rule(rows[index], own, step, place, RowNoise(bits, layout.start))
        random.append(bits)
        tasks.append(Task(rule, layout))
        deliveries.append(layout.delivery(recipe.full_rows))
    made_of: list[Tensor | None] = [None] * len(wave)
    for index, (matrix, recipe) in enumerate(wave):
        # Where the update has whole rows, what they are made of stays; else the rules have it, and let go of it.
        if recipe.full_rows:
            in_rows = "rows" in deliveries[index]
            made_of[index] = rows[index] if in_rows else matrix.layout.form.view(gradients[index])
    del parts, gradients, rows
    updates = yield from run_rounds(tasks)
    shares = [_share(update) for update in updates]
    if "coefficients" in deliveries:
        shares = yield from gather_coefficients(layouts, shares, deliveries)
    lifted = [update.direction for update in updates]
    for index, (matrix, recipe) in enumerate(wave):
        if "rows" in deliveries[index]:
            lifted[index] = _lift(updates[index], matrix, recipe, made_of[index])
    arrived = (yield from exchange_updates(layouts, lifted, deliveries)) if "rows" in deliveries else {}
    for index, (matrix, recipe) in enumerate(wave):
        update, layout = updates[index], matrix.layout
        if update.choice is not None:
            matrix.previous_indices, matrix.captured_energy = update.choice.previous_indices, update.choice.captured
        weight = matrix.piece.view(local(matrix.parameter.detach()))
        lifts = deliveries[index] in ("local", "coefficients")
        once = recipe.weight_rounding == "nearest" and (recipe.rate is None or not recipe.weight_decay)
        narrow = lifts and once and operands[index] == weight.dtype
        target = weight if narrow else weight.to(matrix.dtype)  # the weight itself unless it is of lower precision
        decay, scale = step_size(recipe, layout.form)
        if recipe.rate is not None and recipe.weight_decay:
            target.mul_(1 - recipe.rate * recipe.weight_decay)
        if lifts:
            view = layout.form.view(target)
            _add(view, update, shares[index], recipe, made_of[index], decay, scale, layout.columns)
        elif isinstance(layout, FlatRows):
            layout.add_rows(target, lifted[index], decay=decay, scale=scale)
        else:
            assert isinstance(layout, Delivered)
            layout.add_update(target, arrived[index], decay=decay, scale=scale)
        if target is not weight:
            store_weight(weight, target, recipe.weight_rounding, random[index], layout.offset, layout.form.shape)


def place_of(
    matrix: BoundMatrix,
    device: torch.device,
    cache: DictionaryCache,
    bits: RandomBits,
    counter: Tensor | None = None,
    alone: bool = False,
) -> Place:
    layout, scores = matrix.layout, matrix.scores
    known = (layout.form, matrix.dtype, device, layout.repeated, cache, bits, layout.owned, matrix.role)
    return Place(*known, counter, alone, scores)


def step_size(recipe: Recipe, form: TallForm) -> tuple[float, float]:
    """What the weight and the update are multiplied by, beside `Recipe.rate`."""
    if recipe.rate is not None:
        return 1.0, 1.0
    decay = 1 - float(recipe.lr) * recipe.weight_decay
    scale = -float(recipe.lr) * SCALES[recipe.scale](*form.shape)
    return decay, scale * decay if recipe.decay_last else scale


def _share(update: Update) -> Tensor:
    """What other ranks need of an update: directions, and the weights of rows as one more column."""
    return update.direction if update.weights is None else torch.cat([update.direction, update.weights], dim=1)


def _lift(update: Update, matrix: BoundMatrix, recipe: Recipe, rows: Tensor | None) -> Tensor:
    """The update of the rows worked on, (l, n)."""
    direction = update.direction
    lifted = torch.zeros(len(direction), matrix.layout.form.n, dtype=matrix.dtype, device=direction.device)
    _add(lifted, update, _share(update), recipe, rows, 1.0, 1.0, slice(None))
    return lifted


def _add(
    target: Tensor,
    update: Update,
    share: Tensor,
    recipe: Recipe,
    rows: Tensor | None,
    decay: float,
    scale: float,
    columns: slice,
) -> None:
    """In place: `target = decay * target + scale * update`, for the rows and columns of target."""
    rank = update.direction.shape[1]
    coefficients = share if update.weights is None else share[:, :rank]
    if rank:
        update.basis.add_lifted(target, coefficients, decay=decay, scale=scale, columns=columns)
    else:
        target.mul_(decay)
    if rows is not None and update.weights is not None:
        target.add_(recipe.added(rows.to(target.dtype), share[:, rank:], update.basis), alpha=scale)


def verify_columns(matrices: Sequence[BoundMatrix], state: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    """Compares the chosen columns over the ranks that share a matrix. Collective.

    Raises:
        RuntimeError: on every rank, naming the first rank and parameter that differ.
    """
    by_group: dict[Any, list[BoundMatrix]] = {}
    for matrix in matrices:
        if matrix.layout.group is not None and matrix.present:
            by_group.setdefault(matrix.layout.group, []).append(matrix)
    for group, members in by_group.items():
        sums = torch.stack([_checksum(matrix, state[matrix.parameter]) for matrix in members])
        differing = ranks_that_differ(sums, group)
        if differing:
            rank, position = differing[0]
            raise RuntimeError(
                f"the directions chosen for {members[position].name!r} on rank {dist.get_global_rank(group, rank)} are "
                f"not those of rank {dist.get_global_rank(group, 0)} ({len(differing)} differ in all): state was "
                "corrupted, or ranks have seen different sums; continue from an earlier checkpoint"
            )


def _checksum(matrix: BoundMatrix, of_parameter: Mapping[str, Tensor]) -> Tensor:
    """Of the state that says which directions were chosen, (), int64; depends on the order."""
    own = matrix.state(of_parameter)
    keys = [key for key, spec in matrix.specs.items() if spec.cause in ("indices", "projection") and not spec.sharded]
    parts = [own[key].float().view(torch.int32) if own[key].is_floating_point() else own[key] + 1 for key in keys]
    if matrix.role is not None and matrix.role.is_kept_with(matrix.parameter, matrix.piece.prefix):
        parts.append(of_parameter[matrix.role.key].float().view(torch.int32))
    bits = torch.cat([part.long().flatten() for part in parts] or [own["step"].long().view(1)])
    return (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()
