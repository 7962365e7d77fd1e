"""Starts a run's processes on this machine with torch's elastic launcher, and says in one place how they ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dist_lowrank.checkpoint.folders import newest_line
from dist_lowrank.config import RunConfig, RunFolder, begin_again
from dist_lowrank.exit_codes import RESTARTED, ExitCode
from dist_lowrank.launchers import loopback
from dist_lowrank.launchers.console import SharedConsole
from dist_lowrank.launchers.endings import Interrupted, first_failure, how_stopped, stop_once
from dist_lowrank.launchers.preparation import resolve_processes


def launch(config: RunConfig, folder: RunFolder) -> int:
    """Runs `dist_lowrank.worker` in one process per GPU, or in gloo processes on a CPU, and waits for them.

    After SIGINT, SIGTERM or SIGUSR1 the workers save and end with the current step, whatever signals come meanwhile,
    but for a second SIGINT, after which all end at once. No worker outlives this call. After a failure that another try
    may cure they are started again, in a new attempt, `launcher.max_restarts` times.

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
    loopback.stay_on_loopback()
    store = loopback.open_store()
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="static",
        rdzv_endpoint=f"{loopback.ADDRESS}:{store.port}",
        rdzv_configs={"rank": 0, "timeout": config.launcher.timeout_seconds},
        local_addr="localhost",  # the machine's own name need not resolve
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=config.launcher.stop_seconds,
        logs_specs=SharedConsole(),
    )
    settings.signals_to_handle = ""  # by torch
    stop_once((signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1))
    worker = ("-m", "dist_lowrank.worker", str(folder.attempt_path), "--launcher", str(os.getpid()))
    try:
        elastic_launch(settings, sys.executable)(*worker)
    except ChildFailedError as error:
        return _report(error, folder)
    except Interrupted:
        return ExitCode.INTERRUPTED
    except SignalException:
        return how_stopped(folder)
    return ExitCode.FINISHED


def _cores() -> int:
    """The cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _report(error: ChildFailedError, folder: RunFolder) -> ExitCode:
    """Prints what went wrong first, and only that. Returns its exit code."""
    failure = first_failure(error, folder)
    if failure is None:
        return how_stopped(folder)
    if failure.code is ExitCode.FAILED:
        print(f"error: rank {failure.rank} of {folder.attempt_path} failed: {failure.text.rstrip()}", file=sys.stderr)
    else:
        print("".join(f"error: {line}\n" for line in failure.text.splitlines()), end="", file=sys.stderr)
    if failure.code is not ExitCode.CONFIGURATION:
        print(newest_line(folder.checkpoints), file=sys.stderr)
    return failure.code
