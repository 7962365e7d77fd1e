"""While one activity waits for its collectives, another computes.

A function that communicates is a generator: it begins collectives, yields them, and is resumed when they have ended,
so that it reads as if it had waited for them. `take_turns` runs two such activities at a time. Whose turn it is follows
from how often each has yielded, which must be the same on all ranks: then all begin the same collectives in the same
order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")
Begun = Sequence[dist.Work]
Turns = Generator[Begun, None, Result]


@dataclass
class Activity:
    """What is done in turns, and what says how much memory it holds from the first turn to the last.

    Asked only if something else is under way.
    """

    turns: Turns[None]
    count_bytes: Callable[[], float]
    begun: Begun = ()

    @cached_property
    def held_bytes(self) -> float:
        return self.count_bytes()


def take_turns(activities: Iterable[Activity], workspace_bytes: int) -> None:
    """Runs activities in their order, the next one beside the one before where both fit the workspace.

    Where one raises, what both have begun is waited for first: it ends, since other ranks come that far too, or fails
    with a rank that has ended.
    """
    upcoming = deque(activities)
    running: deque[Activity] = deque()  # in the order of their next turns
    try:
        while running or upcoming:
            if upcoming and _fits(upcoming[0], running, workspace_bytes):
                running.appendleft(upcoming.popleft())
            activity = running[0]
            wait(activity.begun)
            activity.begun = ()  # requests hold on to what they have sent and received
            begun = next(activity.turns, None)
            running.popleft()
            if begun is not None:
                activity.begun = begun
                running.append(activity)
    except BaseException:
        for activity in running:
            for work in activity.begun:
                with suppress(RuntimeError):
                    work.wait()
        raise


def _fits(activity: Activity, running: Sequence[Activity], workspace_bytes: int) -> bool:
    if len(running) != 1:
        return not running
    return activity.held_bytes == 0 or running[0].held_bytes + activity.held_bytes <= workspace_bytes


def at_once(action: Callable[[], None]) -> Turns[None]:
    """An action that waits for nothing, as an activity."""
    yield from ()
    action()


def wait(begun: Begun) -> None:
    for work in begun:
        work.wait()


def finish(turns: Turns[Result]) -> Result:
    """All turns at once; returns the result."""
    while True:
        try:
            wait(next(turns))
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
