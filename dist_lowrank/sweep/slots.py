"""How many points run at the same time, and on which cores and GPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from dist_lowrank.config import ConfigError, RunConfig
from dist_lowrank.launchers.preparation import resolve_processes


def environments(configs: Sequence[RunConfig], jobs: str) -> list[dict[str, str]]:
    """What to add to the environment of each of the points that run at the same time; as many as there are slots.

    Args:
        configs: of all points.
        jobs: a number; or `fit`: as many as there are GPUs, or cores, for.

    Raises:
        ConfigError: if `jobs` is neither, or more than there are GPUs for.
    """
    resolved = [resolve_processes(config) for config in configs]
    processes = max(count for _, count in resolved)
    on_gpus = any(device == "cuda" for device, _ in resolved)
    return _environments(processes, jobs, visible_gpus() if on_gpus else None, _cores(), os.environ)


def _environments(
    processes: int, jobs: str, gpus: Sequence[str] | None, cores: int, environment: Mapping[str, str]
) -> list[dict[str, str]]:
    places = cores if gpus is None else len(gpus)
    fit = max(1, places // processes)
    if jobs != "fit" and not (jobs.isdecimal() and int(jobs) > 0):
        raise ConfigError(f"--jobs: {jobs} is not allowed; allowed: an integer >= 1, or fit (here {fit})")
    count = fit if jobs == "fit" else int(jobs)
    if gpus is not None and count > fit:
        raise ConfigError(
            f"--jobs: {count} is not allowed, {count} points of {processes} ranks need {count * processes} GPUs and "
            f"{len(gpus)} are visible; allowed: 1 to {fit}, or fit"
        )
    if count == 1:
        return [{}]
    if gpus is not None:
        slots = [gpus[index * processes : (index + 1) * processes] for index in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(slot)} for slot in slots]
    threads = environment.get("OMP_NUM_THREADS", str(max(1, cores // (processes * count))))
    return [{"OMP_NUM_THREADS": threads} for _ in range(count)]


def visible_gpus() -> list[str]:
    """The names by which this process may use its GPUs."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
