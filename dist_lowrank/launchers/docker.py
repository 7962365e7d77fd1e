"""`launcher=docker`: the `docker run` of one container on this machine."""

from __future__ import annotations

import shlex

from dist_lowrank.config.launchers import DockerLauncher
from dist_lowrank.launchers.containers import TMPFS, WORKSPACE, container_command, container_environment, mounts
from dist_lowrank.launchers.job import ONE_NODE, Job, joined, needed_secrets


def render(job: Job[DockerLauncher]) -> dict[str, str]:
    """`run.sh`."""
    command = [
        f"exec {shlex.join([*job.launcher.command, 'run', '--rm', '--name', job.name])}",
        *(shlex.join(option) for option in _options(job)),
        shlex.quote(job.launcher.image),
        *container_command(job, ONE_NODE),
    ]
    lines = [
        "#!/usr/bin/env bash",
        f"# {job.run.rpartition('/')[2]} in one container.",
        "# Exit codes: docs/faults.md. After 75, 1 or 76 the same script continues the run.",
        "set -euo pipefail",
        *needed_secrets(job.launcher),
        " \\\n    ".join(command),
    ]
    return {"run.sh": "\n".join(lines) + "\n"}


def commands(job: Job[DockerLauncher]) -> list[list[str]]:
    """Starts it."""
    return [["bash", f"{joined(job.work_directory, job.folder)}/run.sh"]]


def _options(job: Job[DockerLauncher]) -> list[list[str]]:
    launcher = job.launcher
    options = [
        ["--user", job.user, "--cap-drop", "ALL", "--security-opt", "no-new-privileges"],
        ["--shm-size", f"{launcher.shared_memory_gib}g", "--tmpfs", TMPFS],
        ["--network", launcher.network, "--stop-timeout", str(launcher.stop_seconds + 10)],
        ["--workdir", WORKSPACE],
    ]
    if launcher.read_only_root:
        options.append(["--read-only"])
    if launcher.unlimited_memlock:
        options.append(["--ulimit", "memlock=-1:-1", "--ulimit", "stack=67108864"])
    if launcher.infiniband:
        options.append(["--device", "/dev/infiniband", "--cap-add", "IPC_LOCK"])
    if launcher.device == "cuda":
        options.append(["--gpus", str(launcher.nproc_per_node)])
    options += [["--volume", str(mount)] for mount in mounts(job, launcher.mounts)]
    options += [["--env", f"{name}={value}"] for name, value in container_environment(job).items()]
    options += [["--env", name] for name in launcher.secret_environment]  # its value comes from the caller
    return options
