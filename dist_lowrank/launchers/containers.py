"""What containers of a run see of the host: the same for one container, several of compose, and pods."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass

from dist_lowrank.config import RunConfig
from dist_lowrank.config.launchers import RenderingLauncher
from dist_lowrank.launchers.job import Job, environment, joined, torchrun_options, worker_command

WORKSPACE = "/workspace"  # relative paths of the configuration start here
RUNS = "/runs"
TMPFS = "/tmp:exec,mode=1777"  # compiled kernels are loaded from there
CACHE = f"{RUNS}/.cache"  # tokens, tokenizers and downloads, kept between runs


@dataclass(frozen=True)
class Mount:
    """A path of the host and where the container sees it."""

    host: str
    container: str
    read_only: bool = True

    def __str__(self) -> str:
        return f"{self.host}:{self.container}{':ro' if self.read_only else ''}"


def run_in_container(job: Job[RenderingLauncher]) -> str:
    """The run's folder as containers see it."""
    return f"{RUNS}/{job.run.rpartition('/')[2]}"


def mounts(job: Job[RenderingLauncher], more: dict[str, str]) -> list[Mount]:
    """The folder of all runs, and whatever the configuration names, under the same name.

    Args:
        more: further host paths and where they are seen.
    """
    runs = job.run.rpartition("/")[0] or "."
    found = [Mount(joined(job.work_directory, runs), RUNS, read_only=False)]
    for path, read_only in paths_of(job.config):
        found.append(Mount(joined(job.work_directory, path), joined(WORKSPACE, path), read_only))
    found += [Mount(joined(job.work_directory, host), inside) for host, inside in more.items()]
    return list(dict.fromkeys(found))


def container_environment(job: Job[RenderingLauncher]) -> dict[str, str]:
    """Variables of the ranks: everything that programs write goes to /runs or /tmp, as the root may be read-only."""
    variables = {
        "HOME": "/tmp",
        "USER": "trainer",
        "XDG_CACHE_HOME": CACHE,
        "HF_HOME": f"{CACHE}/huggingface",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
        "TRITON_CACHE_DIR": "/tmp/triton",
    }
    if not uses_hub(job.config):
        variables["HF_HUB_OFFLINE"] = "1"
    return variables | environment(job, run_in_container(job))


def container_command(job: Job[RenderingLauncher], rendezvous: list[str]) -> list[str]:
    """torchrun of one node, in groups of words."""
    options = torchrun_options(job, rendezvous)
    return ["python -m dist_lowrank.torchrun", *options, worker_command(job, run_in_container(job))]


def uses_hub(config: RunConfig) -> bool:
    """Whether something comes from the Hugging Face hub."""
    names = (config.model.pretrained, config.data.tokenizer)
    return config.data.source == "hub" or any(name is not None and not os.path.exists(name) for name in names)


def paths_of(config: RunConfig) -> list[tuple[str, bool]]:
    """Files and folders of the host that the configuration names, and whether they are only read."""
    data = config.data
    read = [getattr(data, "path", None), getattr(data, "validation_path", None), config.strategy.config]
    read += [name for name in (config.model.pretrained, data.tokenizer) if name is not None and os.path.exists(name)]
    if config.resume.starts_elsewhere:
        read.append(config.resume.source)
    found = [(_without_pattern(path), True) for path in read if path is not None]
    cache = getattr(data, "cache", None)
    return found if cache is None else [*found, (cache, False)]


def _without_pattern(path: str) -> str:
    """The folder above the first wild card of a glob."""
    while glob.has_magic(path):
        path = os.path.dirname(path) or "."
    return os.path.normpath(path)
