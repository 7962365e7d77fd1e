"""Starts what was rendered, and waits for the commands that do it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dist_lowrank.exit_codes import ExitCode
from dist_lowrank.launchers.job import Job
from dist_lowrank.launchers.rendering import RENDERERS


def submit(job: Job[Any]) -> int:
    """Runs the job's commands side by side; signals go to all of them.

    When one fails the others get `launcher.stop_seconds` to end by themselves. If the run can go on without it, they
    get them when the run is finished: a node that was cut off may not notice.

    Returns:
        The exit code of the command that failed first; 0 if none did, or if the run has finished without it.
    """
    elastic = getattr(job.launcher, "min_nodes", None) is not None
    code = 0
    running: list[subprocess.Popen[bytes]] = []
    with _passing_on(running):
        for command in RENDERERS[job.launcher.name].commands(job):
            try:
                running.append(subprocess.Popen(command))
            except OSError as error:
                print(f"error: {command[0]}: {error.strerror}; the files are written", file=sys.stderr)
                code = ExitCode.FAILED
        deadline, told_to_end = None, False
        while any(process.poll() is None for process in running):
            code = code or next((process.returncode for process in running if process.returncode), 0)
            if deadline is None and (_finished(running) if elastic else code):
                deadline = time.monotonic() + job.launcher.stop_seconds
            if deadline is not None and time.monotonic() > deadline:
                # torchrun may be waiting for a node that is no longer there, and then hears no other signal.
                _signal_all(running, signal.SIGKILL if told_to_end else signal.SIGTERM)
                deadline, told_to_end = time.monotonic() + job.launcher.stop_seconds, True
            time.sleep(0.1)
        if elastic and _finished(running):
            return ExitCode.FINISHED
        return code or next((process.returncode for process in running if process.returncode), 0)


def _finished(running: list[subprocess.Popen[bytes]]) -> bool:
    """Whether the run is: one of its nodes says so."""
    return any(process.returncode == 0 for process in running)


@contextmanager
def _passing_on(running: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """While it lasts, signals to this process go to the commands; Ctrl-C reaches them from the terminal by itself."""
    previous = {
        number: signal.signal(number, lambda received, _: _signal_all(running, received))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    }
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _signal_all(running: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(number)
