"""Runs a function on several real processes that talk over gloo.

The processes are forked from the test's own process, which has imported torch already: two ranks start in 0.1 s, where
torchrun takes 4 s. They meet through a file, and leave by `os._exit`, so gloo's abort at interpreter exit cannot hit.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # imported before the fork, so that the children need not
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor


class RankFailure(AssertionError):
    """A rank raised, died or did not end; the message holds every failing rank's traceback."""


def run_on_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 60, distributed: bool = True
) -> list[Any]:
    """Calls `function(rank, *args)` on each rank; returns the results by rank.

    Results are pickled: return plain tensors or numbers.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _child(rank, world_size, folder, function, args, timeout_seconds, distributed)
            children.append(pid)
        statuses = _wait(children, timeout_seconds)
        failures = [_describe(rank, status, folder) for rank, status in enumerate(statuses) if status != 0]
        if failures:
            raise RankFailure("\n".join(failures))
        results = []
        for rank in range(world_size):
            with open(os.path.join(folder, f"result-{rank}"), "rb") as file:
                results.append(pickle.load(file))
        return results


def _child(
    rank: int,
    world_size: int,
    folder: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    timeout_seconds: float,
    distributed: bool,
) -> None:
    code = 1
    try:
        log = open(os.path.join(folder, f"log-{rank}"), "w")  # noqa: SIM115 (closed by the exit)
        faulthandler.enable(log)
        faulthandler.dump_traceback_later(timeout_seconds - 5, file=log)
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # accelerate too; threads of OpenMP do not survive a fork
        if distributed:
            store = dist.FileStore(os.path.join(folder, "store"), world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        result = function(rank, *args)
        with open(os.path.join(folder, f"result-{rank}"), "wb") as file:
            pickle.dump(result, file)
        if distributed:
            dist.barrier()
        code = 0
    except BaseException:
        with open(os.path.join(folder, f"error-{rank}"), "w") as file:
            file.write(traceback.format_exc())
    finally:
        os._exit(code)


def _wait(children: list[int], timeout_seconds: float) -> list[int | None]:
    """Exit statuses; None for a child that had to be killed. A failure leaves the others three seconds."""
    deadline = time.monotonic() + timeout_seconds
    statuses: list[int | None] = [None] * len(children)
    waiting = set(range(len(children)))
    while waiting and time.monotonic() < deadline:
        for index in list(waiting):
            pid, status = os.waitpid(children[index], os.WNOHANG)
            if pid:
                statuses[index] = status
                waiting.remove(index)
                if status:
                    deadline = min(deadline, time.monotonic() + 3)
        time.sleep(0.002)
    for index in waiting:
        os.kill(children[index], 9)
        os.waitpid(children[index], 0)
    return statuses


def _describe(rank: int, status: int | None, folder: str) -> str:
    text = f"rank {rank}: " + ("killed after the time-out" if status is None else f"exit status {status}")
    for kind in ("error", "log"):
        path = os.path.join(folder, f"{kind}-{rank}")
        if os.path.exists(path):
            with open(path) as file:
                text += "\n" + file.read()
    return text
