"""How the ranks of a node ended, from what torch's elastic agent and the run's folder know."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from dist_lowrank.config import RunFolder
from dist_lowrank.exit_codes import ExitCode


@dataclass(frozen=True)
class Failure:
    """What went wrong first: the other ranks fail because of it."""

    rank: int
    text: str
    code: ExitCode
    told: bool  # whether the rank itself has said so, in a file of the run's folder


class Interrupted(SignalException):
    """Ctrl-C. It stops the workers by SIGTERM, because Python answers a very early SIGINT with a traceback."""


def stop_once(numbers: Iterable[signal.Signals]) -> None:
    """In a launcher: the first of these signals, or of SIGINT, stops the workers, and later ones are ignored.

    While they save, that is: torch's own handler, which has to be told of no signal, would give up waiting for them
    at the third one, and with the launcher they are killed. A second SIGINT does end all at once. What this process was
    started to ignore, as SIGHUP by `nohup`, it ignores.
    """
    first: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        if not first:
            first.append(number)
            raise SignalException("stopped", signal.Signals(number))

    def interrupt(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(ExitCode.INTERRUPTED))  # Linux then kills the workers
        if not first:
            first.append(number)
            raise Interrupted("interrupted", signal.SIGTERM)

    signal.signal(signal.SIGINT, interrupt)
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def how_stopped(folder: RunFolder) -> ExitCode:
    """After a request to stop: what rank 0 noted; or, if it did not come to that, what is true in any case."""
    if folder.is_finished:
        return ExitCode.FINISHED
    return ExitCode(folder.stopped["exit_code"]) if folder.stopped else ExitCode.REQUEUE


def first_failure(error: ChildFailedError, folder: RunFolder) -> Failure | None:
    """The first failure of this node's ranks; None: they were only stopped."""
    by_signal = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGUSR1)  # before the training loop
    stopped = (*by_signal, ExitCode.REQUEUE, ExitCode.INTERRUPTED, ExitCode.TERMINATED)
    found: list[tuple[float, int, str, bool]] = []
    for rank, failure in error.failures.items():
        path = folder.error(rank)
        if path.exists():
            found.append((path.stat().st_mtime, rank, path.read_text(), True))
        elif failure.exitcode in stopped:
            continue  # by the agent, because of another rank, or by someone else
        elif failure.exitcode >= 0:
            found.append((failure.timestamp, rank, f"ended with exit code {failure.exitcode}", False))
        else:
            hint = "; often the system ran out of memory" if failure.exitcode == -signal.SIGKILL else ""
            text = f"was killed by {signal.Signals(-failure.exitcode).name}{hint}"
            # Seen by polling, in whole seconds, so maybe noted after the others' complaints about the lost peer.
            found.append((failure.timestamp - 1, rank, text, False))
    if not found:
        return None
    _, rank, text, told = min(found)
    code = error.failures[rank].exitcode
    return Failure(rank, text, ExitCode(code) if code in set(ExitCode) else ExitCode.FAILED, told)
