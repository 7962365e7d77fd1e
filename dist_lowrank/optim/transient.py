"""How much memory a step needs beside state, gradients and weights: what waves are cut by.

A wave holds something of each of its matrices at once (rows, then coordinates, then directions), which has to fit the
workspace. Beside that, the arithmetic works on one matrix at a time. So a step needs at most the workspace and the
scratch of one matrix; a matrix that alone holds more than the workspace is a wave of its own.

Both are bounds, from what all ranks know; `tests/test_transient_memory.py` measures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_lowrank.kernels.products import BLOCK_ELEMENTS
from dist_lowrank.optim.binding import BoundMatrix
from dist_lowrank.optim.recipe import Recipe, Sum, Whole
from dist_lowrank.optim.rounding import CHUNK_ELEMENTS
from dist_lowrank.optim.subspace import Possible
from dist_lowrank.sharding.layouts import TallForm

_NOISE_BYTES = 48  # per element that is rounded at random, of which CHUNK_ELEMENTS at once: 64-bit hashes of positions


def largest_sum_bytes(recipe: Recipe, form: TallForm, dtype: torch.dtype) -> int:
    """Of the largest sum over ranks in the rule of a matrix whose update is computed in `dtype`."""
    sums = [Sum(each, dtype) if isinstance(each, int) else each for each in recipe.rounds(form, refresh=True)]
    return max((each.elements * each.dtype.itemsize for each in sums if isinstance(each, Sum)), default=0)


def whole_columns(recipe: Recipe, form: TallForm) -> int:
    """Columns of the widest matrix that an owner gets whole; 0 if none does."""
    return max((each.columns for each in recipe.rounds(form, refresh=True) if isinstance(each, Whole)), default=0)


def held_bytes(matrix: BoundMatrix, recipe: Recipe) -> int:
    """What a wave holds of a matrix at once, on the fullest rank."""
    layout, form = matrix.layout, matrix.layout.form
    rows, part = form.n * layout.largest_block, layout.largest_part
    coefficients = form.rank * layout.largest_block
    delivery = layout.delivery(recipe.full_rows)
    phases = [(1 + recipe.full_rows) * rows + coefficients]  # elements; rows, then coordinates, and what comes of them
    if layout.exchanges:
        phases.append(rows + 4 * part)  # received; converted, padded, cut and sent
    if delivery == "coefficients":
        phases.append(3 * coefficients + 2 * form.rank * form.rows)  # received and put together
    elif delivery == "rows":
        phases.append(coefficients + 3 * rows + part)  # lifted, cut and sent; received
    if whole := whole_columns(recipe, form):
        # Sent, received, stacked and computed. Owners have their share of all matrices of the wave, and at most one
        # more, which is in the scratch: the dearest go first.
        phases[0] += (2 * layout.largest_block + 5 * -(-form.rows // layout.group_size)) * whole
    sums_bytes = 3 * largest_sum_bytes(recipe, form, matrix.dtype)  # this rank's, packed, received
    return max(phases) * matrix.dtype.itemsize + sums_bytes


def owned_bytes(matrix: BoundMatrix, recipe: Recipe) -> int:
    """What its owner has of a matrix, beyond its share of the wave, while the result is under way."""
    layout = matrix.layout
    if layout.group_size == 1:
        return 0
    return 2 * layout.form.rows * whole_columns(recipe, layout.form) * matrix.dtype.itemsize


def in_flight_bytes(wave: Sequence[tuple[BoundMatrix, Recipe]]) -> int:
    """What a wave holds while another computes."""
    return sum(held_bytes(*job) for job in wave) + max(owned_bytes(*job) for job in wave)


def sent_bytes(matrix: BoundMatrix, recipe: Recipe) -> int:
    """What the fullest rank sends of a matrix at a step that chooses directions."""
    layout, form = matrix.layout, matrix.layout.form
    if layout.group is None:
        return 0
    delivery, elements = layout.delivery(recipe.full_rows), 0
    if layout.exchanges:
        elements += 2 * form.n if delivery == "own rows" else layout.largest_part
    if delivery == "coefficients":
        elements += layout.largest_block * recipe.columns_delivered(form)
    elif delivery == "rows":
        elements += layout.largest_block * form.n
    for each in recipe.rounds(form, refresh=True):
        if isinstance(each, Whole):
            elements += 2 * layout.largest_block * each.columns
        elif not isinstance(each, Possible):
            elements += 2 * (each.elements if isinstance(each, Sum) else each)
    return elements * matrix.dtype.itemsize


def scratch_bytes(matrix: BoundMatrix, recipe: Recipe) -> int:
    """What the arithmetic on a matrix needs beside what the wave holds, on the fullest rank."""
    layout, form = matrix.layout, matrix.layout.form
    rows, part = form.n * layout.largest_block, layout.largest_part
    coefficients = form.rank * layout.largest_block
    sums = largest_sum_bytes(recipe, form, matrix.dtype) // matrix.dtype.itemsize
    state = [spec for spec in matrix.specs.values() if spec.sharded]
    converted = any(spec.dtype != matrix.dtype for spec in state)  # read and written through copies
    choosing = (3 if converted else 1) * rows  # coordinates beside what they are made of; squared
    choosing += form.transposed * rows  # the block of columns that this rank works on, without gaps
    whole = whole_columns(recipe, form)
    inside = 5 * sums  # powers of a Gram matrix
    inside += (3 if whole else 6) * coefficients  # moments, parts of the direction; owners' are counted below
    inside += form.rank * form.n  # the chosen columns, in a wave of one
    # The chosen columns, as they are and turned, and what they add to a block of the weights.
    applying = 0 if whole else 2 * form.rank * form.n + min(max(rows, part), BLOCK_ELEMENTS)
    narrow = matrix.parameter.dtype != matrix.dtype
    if narrow or layout.delivery(recipe.full_rows) == "rows":
        applying += part  # the weight in the dtype of the arithmetic; the update put together
    if recipe.full_rows:
        applying += 3 * max(rows, part)  # what the residual adds, its part inside the subspace, weighted
    elements = max(choosing, inside, applying)
    if layout.group_size > 1:
        elements += 5 * form.rows * whole  # what the owner with the most has beyond its share
    at_random = any(spec.dtype == torch.int8 for spec in state)  # the geometric code's mark
    rounded = part if narrow and recipe.weight_rounding == "stochastic" else coefficients if at_random else 0
    chunks = _NOISE_BYTES * min(rounded, CHUNK_ELEMENTS)
    chunks += 4 * recipe.scratch_elements(form)
    return elements * matrix.dtype.itemsize + chunks
