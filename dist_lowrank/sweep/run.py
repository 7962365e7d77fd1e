"""Runs the points of a sweep: one process group each, one after the other or several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dist_lowrank.exit_codes import ExitCode
from dist_lowrank.sweep.points import Point, Sweep
from dist_lowrank.sweep.state import State

_POLL_SECONDS = 0.1


class Process(Protocol):
    """A point that runs: the part of `subprocess.Popen` that a sweep uses."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


Start = Callable[[Point, Mapping[str, str]], Process]


def start_point(point: Point, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts `dist-lowrank train` with the point's overrides, in a session of its own, printing to its console file.

    Ctrl-C in a terminal then reaches the sweep alone, which ends its points in order. Linux kills the point if the
    sweep dies.

    Args:
        environment: added to this process's.
    """
    command = [sys.executable, "-m", "dist_lowrank.sweep.point", str(os.getpid()), *point.train_overrides]
    with point.console.open("ab") as console:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )


@dataclass
class _Running:
    point: Point
    process: Process
    started_seconds: float


def run_points(sweep: Sweep, slots: Sequence[Mapping[str, str]], start: Start = start_point) -> tuple[State, int]:
    """Runs the points that are not finished yet and waits for them. A point that fails does not keep the others.

    After SIGINT, SIGTERM or SIGUSR1 no further point starts, and those that run are asked to save and stop; after a
    second one they are killed. Call it in the main thread.

    Args:
        slots: one environment for each point that may run at the same time.
        start: starts one point.

    Returns:
        The state, and the number of the signal that ended the sweep, or 0.
    """
    state = State(sweep)
    total, numbers = len(sweep.points), {point.name: n for n, point in enumerate(sweep.points, start=1)}
    waiting, received = state.of("waiting"), list[int]()
    running: list[_Running | None] = [None] * len(slots)
    if len(waiting) < total:
        print(f"{total - len(waiting)} of {total} points were finished before", flush=True)

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    previous = {number: signal.signal(number, lambda n, _: received.append(n)) for number in handled}
    passed_on = 0
    try:
        while any(running) or (waiting and not received):
            if len(received) > passed_on:
                for active in filter(None, running):
                    active.process.terminate() if passed_on == 0 else active.process.kill()
                passed_on = len(received)
            for index, each in enumerate(running):
                if each is not None and (code := each.process.poll()) is not None:
                    running[index] = None
                    _ended(state, each, code, f"point {numbers[each.point.name]}/{total}", stopped=bool(received))
                if running[index] is None and waiting and not received:
                    point = waiting.pop(0)
                    point.folder.mkdir(parents=True, exist_ok=True)
                    state.set(point, "running")
                    print(f"point {numbers[point.name]}/{total} {point.name} starts", flush=True)
                    running[index] = _Running(point, start(point, slots[index]), time.monotonic())
            time.sleep(_POLL_SECONDS)
    finally:
        for active in filter(None, running):
            active.process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return state, received[0] if received else 0


def _ended(state: State, ended: _Running, code: int, name: str, *, stopped: bool) -> None:
    point = ended.point
    seconds = time.monotonic() - ended.started_seconds
    if code == 0 and point.run:
        state.set(point, "finished", code)
        print(f"{name} {point.name} finished in {seconds:.0f} s", flush=True)
    elif stopped or code in (ExitCode.REQUEUE, ExitCode.TERMINATED):  # the second also by its own time limit
        state.set(point, "stopped", code)
        print(f"{name} {point.name} stopped; the same command continues it", flush=True)
    else:
        state.set(point, "failed", code)
        reason = f" ({line})" if (line := _last_error(point)) else ""
        print(f"error: {name} {point.name} failed with exit code {code}{reason}; see {point.console}", file=sys.stderr)


def _last_error(point: Point) -> str:
    lines = point.console.read_text(errors="replace").splitlines() if point.console.exists() else []
    return next((line for line in reversed(lines) if line.startswith("error: ")), "").removeprefix("error: ")
