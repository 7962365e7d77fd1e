"""A real all-reduce over all nodes, timed and checked: processes of their own, so that a hang is theirs alone.

`python -m dist_lowrank.doctor.all_reduce TASK` is one rank; TASK is a `Task` as JSON. It prints its `Reduced` as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

_BYTES = {"nccl": 256 * 2**20, "gloo": 16 * 2**20}
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Task:
    """What a rank has to know."""

    host: str  # of the store
    port: int
    backend: str  # nccl or gloo
    rank: int
    world_size: int
    local_rank: int
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Reduced:
    """What a rank found."""

    rank: int
    seconds: float  # of the fastest repeat
    bytes: int
    is_exact: bool  # integers added up to what they should
    digest: str  # of the sums of other numbers, which have to be equal bit by bit on all ranks

    @property
    def gigabytes_per_second(self) -> float:
        """Of one process: bytes by seconds."""
        return self.bytes / self.seconds / 1e9


def run_ranks(first: Task, processes: int) -> list[Reduced] | str:
    """Runs this node's ranks and waits for them; returns what they found, or what went wrong.

    Args:
        first: the task of the first of them.
    """
    deadline = time.monotonic() + first.timeout_seconds
    tasks = [replace(first, rank=first.rank + number, local_rank=number) for number in range(processes)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "dist_lowrank.doctor.all_reduce", json.dumps(asdict(task))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in tasks
    ]
    found, problems = [], []
    for task, rank in zip(tasks, ranks, strict=True):
        try:
            printed, errors = rank.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.communicate()
            problems.append(f"rank {task.rank} was not done within {first.timeout_seconds:.0f} s")
            continue
        if rank.returncode == 0:
            found.append(Reduced(**json.loads(printed.splitlines()[-1])))
        else:
            last = next((line for line in reversed(errors.splitlines()) if line.strip()), f"exit {rank.returncode}")
            problems.append(f"rank {task.rank}: {last}")
    return "; ".join(problems) or found


def disagreements(found: Sequence[Reduced]) -> list[str]:
    """What is wrong with the results of all ranks; nothing if they agree bit by bit."""
    wrong = [f"rank {each.rank} has a wrong sum" for each in found if not each.is_exact]
    return wrong + [f"rank {r.rank} has other sums than rank 0" for r in found[1:] if r.digest != found[0].digest]


def _reduce(task: Task) -> Reduced:
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    timeout = timedelta(seconds=task.timeout_seconds)
    device = torch.device("cpu")
    if task.backend == "nccl":
        device = torch.device("cuda", task.local_rank)
        torch.cuda.set_device(device)
    store = TCPStore(task.host, task.port, is_master=False, timeout=timeout)
    dist.init_process_group(
        task.backend,
        store=PrefixStore("all_reduce", store),
        rank=task.rank,
        world_size=task.world_size,
        timeout=timeout,
    )
    count = _BYTES[task.backend] // 4
    places = torch.arange(count, dtype=torch.float32, device=device) % 1009
    integers = places + task.rank  # their sums are exact in float32, in any order
    dist.all_reduce(integers)
    ranks = task.world_size * (task.world_size - 1) // 2
    is_exact = bool((integers == places * task.world_size + ranks).all())
    generator = torch.Generator().manual_seed(task.rank)
    fractions = torch.randn(count, generator=generator).to(device)  # their sums depend on the order
    dist.all_reduce(fractions)
    digest = hashlib.sha256(fractions.cpu().numpy().tobytes()).hexdigest()
    fastest = float("inf")
    for _ in range(_REPEATS):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(integers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    dist.barrier()
    return Reduced(task.rank, fastest, _BYTES[task.backend], is_exact, digest)


if __name__ == "__main__":
    from dist_lowrank.worker import end_with_parent, leave

    end_with_parent()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps(asdict(_reduce(Task(**json.loads(sys.argv[1]))))), flush=True)
    leave(0)
