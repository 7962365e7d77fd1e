"""Requests to stop: signals and the wall clock. The loop looks at them once per step and asks the other ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from dist_lowrank.exit_codes import ExitCode


class StopReason(Enum):
    """What asked a rank to stop, in words."""

    INTERRUPT = "Ctrl-C"
    TERMINATE = "SIGTERM"
    USER_SIGNAL = "SIGUSR1"
    HANG_UP = "SIGHUP"  # the terminal was closed
    TIME_LIMIT = "the time limit"
    OTHER_RANK = "a request to another rank"


_REASONS = {
    signal.SIGINT: StopReason.INTERRUPT,
    signal.SIGTERM: StopReason.TERMINATE,
    signal.SIGUSR1: StopReason.USER_SIGNAL,
    signal.SIGHUP: StopReason.HANG_UP,
}


@contextmanager
def stop_requests(stop_in_seconds: float | None = None) -> Iterator[list[StopReason]]:
    """A list that SIGINT, SIGTERM, SIGUSR1, SIGHUP and the clock append to, for the loop to look at between steps.

    A second SIGINT ends the process at once. What this process was started to ignore, as SIGHUP by `nohup`, it ignores.

    Args:
        stop_in_seconds: when the clock asks; None: never.
    """
    received: list[StopReason] = []

    def note(number: int, _: object) -> None:
        reason = _REASONS[signal.Signals(number)]
        if reason is StopReason.INTERRUPT and reason in received:
            os._exit(ExitCode.INTERRUPTED)
        received.append(reason)

    heard = [number for number in _REASONS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in heard}
    clock = None
    if stop_in_seconds is not None:
        clock = threading.Timer(max(0.0, stop_in_seconds), received.append, [StopReason.TIME_LIMIT])
        clock.daemon = True
        clock.start()
    try:
        yield received
    finally:
        if clock is not None:
            clock.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)


def seconds_since_launch() -> float:
    """How long the launcher of this rank has run, which outlives restarts; 0 where the system does not tell."""
    try:
        with open(f"/proc/{os.getppid()}/stat") as file:
            started_ticks = int(file.read().rpartition(")")[2].split()[19])  # field 22, after the bracketed name
    except (OSError, ValueError, IndexError):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
