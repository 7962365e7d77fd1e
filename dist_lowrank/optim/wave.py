"""One wave: matrices that are updated together, in lockstep.

fetch rows        where a rank does not hold them whole: one all-to-all
run the rules     one all-reduce per round
deliver           where rows were divided: coefficients, L x r, or lifted rows
apply             W <- (1 - lr wd) W - lr scale direction D[:, I]^T
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lowrank.dictionaries import Dictionary, DictionaryCache
from dist_lowrank.optim.binding import BoundMatrix
from dist_lowrank.optim.dense import local_gradients
from dist_lowrank.optim.recipe import SCALES, Recipe, Update, low_rank_rule
from dist_lowrank.optim.rounding import RandomBits, RowNoise, store_weight
from dist_lowrank.optim.transient import held_bytes
from dist_lowrank.sharding.layouts import local
from dist_lowrank.sharding.rounds import Task, ranks_that_differ, run_rounds
from dist_lowrank.sharding.transport import exchange_updates, fetch_rows, gather_coefficients

Job = tuple[BoundMatrix, Recipe]


def cut_waves(jobs: Sequence[Job], workspace_bytes: int) -> Iterator[list[Job]]:
    """Cuts the work so that what a wave holds fits the workspace, at least one matrix each.

    Decided from what all ranks know, so all cut alike.
    """
    wave: list[Job] = []
    used_bytes = 0
    for matrix, recipe in jobs:
        needed_bytes = held_bytes(matrix, recipe)
        if wave and used_bytes + needed_bytes > workspace_bytes:
            yield wave
            wave, used_bytes = [], 0
        wave.append((matrix, recipe))
        used_bytes += needed_bytes
    if wave:
        yield wave


def count_steps(jobs: Sequence[Job], state: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    """Adds 1 to the step counters of all matrices to be updated; those of a stack share theirs."""
    counters = [state[matrix.parameter][f"{matrix.piece.prefix}step"] for matrix, _ in jobs]
    for counter in {id(counter): counter for counter in counters}.values():
        counter.add_(1)


def update_wave(wave: Sequence[Job], state: Mapping[Tensor, Mapping[str, Tensor]], cache: DictionaryCache) -> None:
    """Updates the matrices of a wave. Collective over the ranks that share them."""
    # Also of matrices that other ranks hold: this can be collective.
    by_parameter = local_gradients([(matrix.parameter, matrix.piece) for matrix, _ in wave])
    wave = [(matrix, recipe) for matrix, recipe in wave if matrix.present]
    layouts = [matrix.layout for matrix, _ in wave]
    gradients = [matrix.piece.view(by_parameter[matrix.parameter]) for matrix, _ in wave]
    rows = fetch_rows(layouts, gradients, [matrix.dtype for matrix, _ in wave])
    dictionaries = [_dictionary(matrix, recipe, cache) for matrix, recipe in wave]
    tasks, chosen_before, random = [], [], []
    for index, ((matrix, recipe), dictionary) in enumerate(zip(wave, dictionaries, strict=True)):
        own = matrix.state(state[matrix.parameter])
        step = int(own["step"])
        chosen_before.append(own["indices"][: 0 if step == 1 else None].clone())
        layout, bits = matrix.layout, RandomBits(recipe.seed, matrix.name, step)
        noise = RowNoise(bits, layout.start)
        rule = low_rank_rule(rows[index], own, step, recipe, layout.form, dictionary, noise, layout.owned)
        random.append(bits)
        tasks.append(Task(rule, matrix.layout.group))
    del by_parameter, gradients, rows  # the rules have them, and let go of them as soon as they can
    updates = run_rounds(tasks)
    directions = gather_coefficients(layouts, [update.direction for update in updates])
    lifted = [
        _lift(update, dictionary) if layout.delivery in ("rows", "own rows") else update.direction
        for layout, update, dictionary in zip(layouts, updates, dictionaries, strict=True)
    ]
    arrived = exchange_updates(layouts, lifted)
    for index, (matrix, recipe) in enumerate(wave):
        scores, indices = updates[index].scores, updates[index].indices
        if scores is not None:
            matrix.previous_indices = chosen_before[index]
            matrix.captured_energy = scores[indices].sum() / scores.sum()
        weight = matrix.piece.view(local(matrix.parameter.detach()))
        target = weight.to(matrix.dtype)  # the weight itself unless it is of lower precision
        _apply(target, matrix, recipe, dictionaries[index], directions[index], indices, lifted[index], arrived[index])
        if weight.dtype != matrix.dtype:
            layout = matrix.layout
            store_weight(weight, target, recipe.weight_rounding, random[index], layout.offset, layout.form.shape)


def _dictionary(matrix: BoundMatrix, recipe: Recipe, cache: DictionaryCache) -> Dictionary:
    transform = recipe.transform
    if transform == "auto" and recipe.materialize and matrix.layout.repeated:
        transform = "gemm"  # ranks that repeat the same work must round alike, so none may measure for itself
    return cache.get(
        recipe.dictionary,
        matrix.layout.form.n,
        dtype=matrix.dtype,
        device=local(matrix.parameter).device,
        seed=recipe.seed,
        transform=transform,
        materialize=recipe.materialize,
    )


def _lift(update: Update, dictionary: Dictionary) -> Tensor:
    rows = update.direction.new_zeros(len(update.direction), dictionary.n)
    dictionary.add_lifted(rows, update.direction, update.indices, decay=1.0, scale=1.0)
    return rows


def _apply(
    target: Tensor,
    matrix: BoundMatrix,
    recipe: Recipe,
    dictionary: Dictionary,
    direction: Tensor,
    indices: Tensor,
    lifted: Tensor,
    arrived: list[Tensor],
) -> None:
    """Updates the local values of a parameter, from whichever form of the update its layout delivers."""
    layout = matrix.layout
    decay = 1 - float(recipe.lr) * recipe.weight_decay
    scale = -float(recipe.lr) * SCALES[recipe.scale](*layout.form.shape)
    if layout.delivery == "rows":
        layout.add_update(target, arrived, decay=decay, scale=scale)
    elif layout.delivery == "own rows":
        layout.add_rows(target, lifted, decay=decay, scale=scale)
    else:
        view = layout.form.view(target)
        dictionary.add_lifted(view, direction, indices, decay=decay, scale=scale, columns=layout.columns)


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
        sums = torch.stack([_checksum(matrix.state(state[matrix.parameter])["indices"]) for matrix in members])
        differing = ranks_that_differ(sums, group)
        if differing:
            rank, position = differing[0]
            raise RuntimeError(
                f"the columns chosen for {members[position].name!r} on rank {dist.get_global_rank(group, rank)} are "
                f"not those of rank {dist.get_global_rank(group, 0)} ({len(differing)} differ in all): state was "
                "corrupted, or ranks have seen different sums; continue from an earlier checkpoint"
            )


def _checksum(indices: Tensor) -> Tensor:
    """Of ascending indices, (), int64; depends on their order."""
    return ((indices.long() + 1) * torch.arange(1, indices.numel() + 1, device=indices.device)).sum()
