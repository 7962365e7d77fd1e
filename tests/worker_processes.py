"""Real workers, whole: forked from the test's process, which has imported torch already, and ended as they end."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from processes import run_on_ranks  # noqa: F401 (imports what workers need before the fork)

from dist_lowrank import worker
from dist_lowrank.config import RunFolder

KILLED = -signal.SIGKILL
_ASIDE: dict[Path, tempfile.TemporaryDirectory[str]] = {}


def start_workers(
    folder: RunFolder, prepare: Callable[[int], None] = lambda rank: None, world_size: int = 2
) -> list[int]:
    """Forks the ranks of a run; returns their process ids. `output` tells what they print.

    Args:
        prepare: called in each rank before anything else; arms a fault, for example.
    """
    # Not in the run's folder, whose disk may be full.
    aside = _ASIDE[folder.attempt_path] = tempfile.TemporaryDirectory()
    children = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _work(folder, prepare, rank, world_size, Path(aside.name))
        children.append(pid)
    return children


def wait_for(children: list[int], timeout_seconds: float = 60) -> list[int]:
    """Exit codes by rank; minus the number of the signal that killed it.

    As a launcher does, it gives the others `stop_seconds` after the first failure, and kills what is then left.
    """
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(codes) < len(children) and time.monotonic() < deadline:
        for rank in [each for each in range(len(children)) if each not in codes]:
            pid, status = os.waitpid(children[rank], os.WNOHANG)
            if pid:
                codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    for rank in [each for each in range(len(children)) if each not in codes]:
        os.kill(children[rank], signal.SIGKILL)
        os.waitpid(children[rank], 0)
        codes[rank] = KILLED
    return [codes[rank] for rank in range(len(children))]


def output(folder: RunFolder, rank: int = 0) -> str:
    """What a rank has printed."""
    return Path(_ASIDE[folder.attempt_path].name, f"output-{rank}.txt").read_text()


def _work(folder: RunFolder, prepare: Callable[[int], None], rank: int, world_size: int, aside: Path) -> NoReturn:
    try:
        file = os.open(aside / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (pytest has put its own in place)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        torch.set_num_threads(1)  # the OpenMP threads of the test's process do not survive the fork
        prepare(rank)
        worker._work(folder.config(), folder, dist.FileStore(str(aside / "store"), world_size), speaks=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(99)  # nothing of the test's own runs in a rank
