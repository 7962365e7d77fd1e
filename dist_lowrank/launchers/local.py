"""Starts a run's processes on this machine with torch's elastic launcher, and says in one place how they ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from types import FrameType
from typing import NoReturn

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dist_lowrank.checkpoint.folders import newest_line
from dist_lowrank.config import RunConfig, RunFolder, begin_again
from dist_lowrank.exit_codes import RESTARTED, ExitCode
from dist_lowrank.launchers.preparation import resolve_processes


def launch(config: RunConfig, folder: RunFolder) -> int:
    """Runs `dist_lowrank.worker` in one process per GPU, or in gloo processes on a CPU, and waits for them.

    After SIGINT, SIGTERM or SIGUSR1 the workers save and end with the current step; after a second SIGINT all end at
    once. No worker outlives this call. After a failure that another try may cure they are started again, in a new
    attempt, `launcher.max_restarts` times.

    Returns:
        The exit code of the command, see `ExitCode`.
    """
    for restarts_left in range(config.launcher.max_restarts, -1, -1):
        code = _launch_once(config, folder)
        if code not in RESTARTED or restarts_left == 0:
            break
        folder = begin_again(folder)
        print(f"restarting, {restarts_left - 1} restarts left; {folder.announcement}", flush=True)
    return code


def _launch_once(config: RunConfig, folder: RunFolder) -> ExitCode:
    _, processes = resolve_processes(config)
    if config.launcher.threads is not None or "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(config.launcher.threads or max(1, _cores() // processes))
    # The launcher's own account of a failure is long and comes after the worker's; `_report` says it once.
    for name in ("", ".agent.server.api", ".agent.server.local_elastic_agent"):
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        local_addr="localhost",  # the machine's own name need not resolve
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=config.launcher.stop_seconds,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # workers write to this console
    )
    settings.signals_to_handle = "SIGTERM,SIGHUP,SIGQUIT,SIGUSR1"
    signal.signal(signal.SIGINT, _interrupt)
    try:
        elastic_launch(settings, sys.executable)("-m", "dist_lowrank.worker", str(folder.attempt_path))
    except ChildFailedError as error:
        return _report(error, folder)
    except _Interrupted:
        return ExitCode.INTERRUPTED
    except SignalException:
        return _how_stopped(folder)
    return ExitCode.FINISHED


class _Interrupted(SignalException):
    """Ctrl-C. It stops the workers by SIGTERM, because Python answers an early SIGINT with a traceback."""


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, lambda *_: os._exit(ExitCode.INTERRUPTED))  # Linux then kills the workers
    raise _Interrupted("interrupted", signal.SIGTERM)


def _cores() -> int:
    """The cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _how_stopped(folder: RunFolder) -> ExitCode:
    """After a request to stop: what rank 0 noted; or, if it did not come to that, what is true in any case."""
    if folder.is_finished:
        return ExitCode.FINISHED
    return ExitCode(folder.stopped["exit_code"]) if folder.stopped else ExitCode.REQUEUE


def _report(error: ChildFailedError, folder: RunFolder) -> ExitCode:
    """Prints what went wrong first, and only that: the other ranks fail because of it. Returns its exit code."""
    stopped = (-signal.SIGTERM, ExitCode.REQUEUE, ExitCode.INTERRUPTED, ExitCode.TERMINATED)
    found: list[tuple[float, int, str]] = []
    for rank, failure in error.failures.items():
        path = folder.error(rank)
        if path.exists():
            found.append((path.stat().st_mtime, rank, path.read_text()))
        elif failure.exitcode in stopped:
            continue  # by this launcher, because of another rank, or by someone else
        elif failure.exitcode >= 0:
            found.append((failure.timestamp, rank, f"ended with exit code {failure.exitcode}"))
        else:
            hint = "; often the system ran out of memory" if failure.exitcode == -signal.SIGKILL else ""
            # Seen by polling, in whole seconds, so maybe noted after the others' complaints about the lost peer.
            found.append((failure.timestamp - 1, rank, f"was killed by {signal.Signals(-failure.exitcode).name}{hint}"))
    if not found:
        return _how_stopped(folder)
    _, rank, text = min(found)
    code = error.failures[rank].exitcode
    if code in set(ExitCode) - {ExitCode.FAILED}:
        print("".join(f"error: {line}\n" for line in text.splitlines()), end="", file=sys.stderr)
    else:
        code = ExitCode.FAILED
        print(f"error: rank {rank} of {folder.attempt_path} failed: {text.rstrip()}", file=sys.stderr)
    if code != ExitCode.CONFIGURATION:
        print(newest_line(folder.checkpoints), file=sys.stderr)
    return ExitCode(code)
