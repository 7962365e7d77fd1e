"""From a prepared run to its launch files, and to the commands that start it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lowrank.config import RunConfig, RunFolder
from dist_lowrank.config.launchers import HostContainer, RenderingLauncher
from dist_lowrank.config.run_folder import write_atomically
from dist_lowrank.launchers import compose, deepspeed, docker, kubernetes, slurm, torchrun
from dist_lowrank.launchers.job import Job


@dataclass(frozen=True)
class Renderer:
    """What a launcher's file has to offer."""

    render: Callable[[Job[Any]], dict[str, str]]  # texts of files by name
    commands: Callable[[Job[Any]], list[list[str]]]  # one per process that starts the job


RENDERERS = {
    "torchrun": Renderer(torchrun.render, torchrun.commands),
    "deepspeed": Renderer(deepspeed.render, deepspeed.commands),
    "kubernetes": Renderer(kubernetes.render, kubernetes.commands),
    "slurm": Renderer(slurm.render, slurm.commands),
    "slurm_pyxis": Renderer(slurm.render, slurm.commands),
    "docker": Renderer(docker.render, docker.commands),
    "compose": Renderer(compose.render, compose.commands),
}

_IMAGE_USER = 1000  # of docker/, for when root launches


def make_job(config: RunConfig, folder: RunFolder) -> Job[RenderingLauncher]:
    """The job of a run's attempt, launched by this user in the current directory."""
    launcher = config.launcher
    assert isinstance(launcher, RenderingLauncher)
    return Job(
        config=config,
        launcher=launcher,
        run=str(folder.path),
        attempt=folder.attempt,
        work_directory=getattr(launcher, "work_directory", None) or os.getcwd(),
        python=sys.executable,
        user=getattr(launcher, "user", None) or f"{os.getuid() or _IMAGE_USER}:{os.getgid() or _IMAGE_USER}",
    )


def write_files(job: Job[Any], folder: RunFolder) -> list[Path]:
    """Renders a job into `attempt-N/launch/`, and makes what its processes expect to find."""
    launch = folder.attempt_path / "launch"
    launch.mkdir()
    if job.launcher.device == "cuda":
        (folder.path / "flight_recorder").mkdir(exist_ok=True)
    written = []
    for name, text in RENDERERS[job.launcher.name].render(job).items():
        path = launch / name
        write_atomically(path, text)
        if text.startswith("#!"):
            path.chmod(0o755)
        written.append(path)
    if isinstance(job.launcher, HostContainer):
        _give_to_user(job, folder)
    return written


def by_hand(job: Job[Any]) -> list[str]:
    """What a user would type to start the written files."""
    return [shlex.join(command) for command in RENDERERS[job.launcher.name].commands(job)]


def _give_to_user(job: Job[Any], folder: RunFolder) -> None:
    """Makes the run's folder, and the cache beside it, writable for the container's user, if another one launches."""
    cache = folder.path.parent / ".cache"
    cache.mkdir(exist_ok=True)
    user, group = map(int, job.user.split(":"))
    if os.getuid() == 0 != user:
        for path in (folder.path, *folder.path.rglob("*"), cache):
            os.chown(path, user, group)
