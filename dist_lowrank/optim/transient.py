"""How much memory a step needs beside state, gradients and weights: what waves are cut by.

A wave holds something of each of its matrices at once (rows, then coordinates, then directions), which has to fit the
workspace. Beside that, the arithmetic works on one matrix at a time. So a step needs at most the workspace and the
scratch of one matrix; a matrix that alone holds more than the workspace is a wave of its own.

Both are bounds, from what all ranks know; `tests/test_transient_memory.py` measures.
"""

from __future__ import annotations

from dist_lowrank.optim.binding import BoundMatrix
from dist_lowrank.optim.recipe import Recipe
from dist_lowrank.optim.rounding import CHUNK_ELEMENTS

_NOISE_BYTES = 48  # per element that is rounded at random, of which CHUNK_ELEMENTS at once: 64-bit hashes of positions
_FORMULA_BYTES = 32  # per entry of a dictionary that is made from its formula, of which 2^20 at once


def held_bytes(matrix: BoundMatrix, recipe: Recipe) -> int:
    """What a wave holds of a matrix at once, on the fullest rank."""
    layout, form = matrix.layout, matrix.layout.form
    rows, part = form.n * layout.largest_block, layout.largest_part
    coefficients = form.rank * layout.largest_block
    phases = [rows + coefficients]  # elements; rows, then coordinates, and what comes of them
    if layout.exchanges:
        phases.append(rows + 4 * part)  # received; converted, padded, cut and sent
    if layout.delivery == "coefficients":
        phases.append(3 * coefficients + 2 * form.rank * form.rows)  # received and put together
    elif layout.delivery == "rows":
        phases.append(coefficients + 3 * rows + part)  # lifted, cut and sent; received
    sums = 3 * max(recipe.statistics(form, refresh=True), default=0)  # this rank's, packed, received
    return (max(phases) + sums) * matrix.dtype.itemsize


def scratch_bytes(matrix: BoundMatrix, recipe: Recipe) -> int:
    """What the arithmetic on a matrix needs beside what the wave holds, on the fullest rank."""
    layout, form = matrix.layout, matrix.layout.form
    rows, part = form.n * layout.largest_block, layout.largest_part
    coefficients = form.rank * layout.largest_block
    sums = max(recipe.statistics(form, refresh=True), default=0)
    state = [spec for spec in recipe.state(form, matrix.dtype).values() if spec.sharded]
    converted = any(spec.dtype != matrix.dtype for spec in state)  # read and written through copies
    choosing = (3 if converted else 1) * rows  # coordinates beside what they are made of; squared
    inside = 6 * coefficients + 5 * sums  # moments, parts of the direction; powers of a Gram matrix
    applying = form.rank * form.n  # the chosen columns
    narrow = matrix.parameter.dtype != matrix.dtype
    if narrow or layout.delivery == "rows":
        applying += part  # the weight in the dtype of the arithmetic; the update put together
    elements = max(choosing, inside, applying)
    at_random = any(spec.cause == "moments" and spec.dtype.itemsize == 1 for spec in state)
    rounded = part if narrow and recipe.weight_rounding == "stochastic" else coefficients if at_random else 0
    chunks = _NOISE_BYTES * min(rounded, CHUNK_ELEMENTS)
    if not recipe.materialize:
        chunks += _FORMULA_BYTES * min(form.rank * form.n, CHUNK_ELEMENTS)
    return elements * matrix.dtype.itemsize + chunks
