"""What else would fit: the largest micro-batch and the largest rank of the subspace."""

from __future__ import annotations

from collections.abc import Callable

from dist_lowrank.planning.plan import Plan, Planner

LARGEST_MICRO_BATCH = 2**20


def largest_micro_batch(planner: Planner, allowed_bytes: int) -> int | None:
    """Sequences per rank and forward pass; 0: not even one. None: nothing was traced."""
    if planner.estimate is None:
        return None
    return _largest(LARGEST_MICRO_BATCH, lambda size: _fits(planner.plan(size), allowed_bytes))


def largest_rank(planner: Planner, allowed_bytes: int) -> int | None:
    """Columns, at most all; 0: not even one. None: the optimizer has no subspace of columns."""
    sizes = [each.form.n for each in planner.parameters if each.form is not None]
    optimizer = planner.config.optimizer
    if not sizes or not hasattr(optimizer, "rank") or getattr(optimizer, "subspace", None) == "blocks":
        return None
    return _largest(max(sizes), lambda rank: _fits(planner.with_rank(rank), allowed_bytes))


def _fits(plan: Plan, allowed_bytes: int) -> bool:
    """In its steps; neither changes what it holds at the start."""
    return max(int(plan.forward_backward_bytes.max()), int(plan.update_bytes.max())) <= allowed_bytes


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, where all smaller ones do too; 0 if 1 does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
