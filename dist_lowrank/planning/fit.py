"""What else would fit: the largest micro-batch and the largest rank of the subspace."""

from __future__ import annotations

from collections.abc import Callable

from dist_lowrank.planning.plan import Plan, Planner

LARGEST_MICRO_BATCH = 2**20
NEAR_ENOUGH = 0.02  # of the micro-batch that fits; each that is tried takes a trace


def largest_micro_batch(planner: Planner, allowed_bytes: int) -> int | None:
    """Sequences per rank and forward pass, of which 2 % more do not fit; 0: not even one. None: nothing was traced.

    The global batch grows where a step would have less than one micro-batch. It is one micro-batch then: nothing
    accumulates, which needs less. So these are tried first.
    """
    if planner.estimate is None:
        return None
    one_pass = max(1, planner.config.train.global_batch_size // planner.world_size)
    if _excess(planner.plan(one_pass), allowed_bytes) <= 0:
        return _root(one_pass, LARGEST_MICRO_BATCH, lambda size: _excess(planner.plan(size), allowed_bytes))
    if one_pass == 1 or _excess(planner.plan(1), allowed_bytes) > 0:
        return 0
    return _root(1, one_pass, lambda size: _excess(planner.plan(size), allowed_bytes))


def _root(low: int, stop: int, excess: Callable[[int], int]) -> int:
    """The largest size below `stop` of no excess, to 2 %, where `low` has none and excess grows with size.

    The excess is convex: the most of what is there at different moments, each of which grows linearly. So between
    two sizes it lies below the line, and beyond them above.
    """
    high, before = stop, low
    step = max(4 * low, 8)
    at = {low: excess(low)}
    while high - low > max(1, int(NEAR_ENOUGH * low)):
        if high == stop:
            slope = (at[low] - at[before]) / (low - before) if low > before else 0.0
            guess = low + int(-at[low] / slope) + 1 if slope > 0 else low + step
            step *= 4
        else:
            guess = low + int((high - low) * -at[low] / (at[high] - at[low]))
            if guess - low <= NEAR_ENOUGH * low / 2:  # nearly reached from below: prove it
                guess = low + max(1, int(NEAR_ENOUGH * low))
        guess = min(max(guess, low + 1), high - 1)
        at[guess] = excess(guess)
        if at[guess] <= 0:
            before, low = low, guess
        else:
            high = guess
    return low


def largest_rank(planner: Planner, allowed_bytes: int) -> int | None:
    """Columns, at most all; 0: not even one. None: the optimizer has no subspace of columns."""
    sizes = [each.form.n for each in planner.parameters if each.form is not None]
    optimizer = planner.config.optimizer
    if not sizes or not hasattr(optimizer, "rank") or getattr(optimizer, "subspace", None) == "blocks":
        return None
    return _largest(max(sizes), lambda rank: _fits(planner.with_rank(rank), allowed_bytes))


def _fits(plan: Plan, allowed_bytes: int) -> bool:
    return _excess(plan, allowed_bytes) <= 0


def _excess(plan: Plan, allowed_bytes: int) -> int:
    """In its steps; neither a micro-batch nor a rank changes what it holds at the start."""
    return max(int(plan.forward_backward_bytes.max()), int(plan.update_bytes.max())) - allowed_bytes


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, where all smaller ones do too; 0 if 1 does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
