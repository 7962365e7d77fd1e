"""`launcher=compose`: several containers on one machine, each a node, to try out what a cluster would do."""

from __future__ import annotations

import shlex
from typing import Any

from dist_lowrank.config.launchers import ComposeLauncher
from dist_lowrank.launchers.containers import (
    TMPFS,
    WORKSPACE,
    container_command,
    container_environment,
    mounts,
)
from dist_lowrank.launchers.job import Job, joined, rendezvous_options
from dist_lowrank.launchers.manifests import dump


def render(job: Job[ComposeLauncher]) -> dict[str, str]:
    """`compose.yaml` with services node0, node1 and so on, on a network of their own."""
    about = (
        f"# {job.run.rpartition('/')[2]}: each container is a node on a network of their own; no port is published.\n"
        "# `up` again continues the run after exit code 75, 1 or 76 (docs/faults.md).\n"
    )
    services = {f"node{rank}": _without_variables(_service(job, rank)) for rank in range(job.launcher.nodes)}
    return {"compose.yaml": about + dump({"services": services})}


def commands(job: Job[ComposeLauncher]) -> list[list[str]]:
    """Starts all nodes, waits, and ends with the exit code of the first one."""
    file = f"{joined(job.work_directory, job.folder)}/compose.yaml"
    until_one_ends = ["--abort-on-container-exit", "--exit-code-from", "node0"]
    return [[*job.launcher.command, "-p", job.name, "-f", file, "up", *until_one_ends]]


def _service(job: Job[ComposeLauncher], rank: int) -> dict[str, Any]:
    launcher = job.launcher
    service: dict[str, Any] = {
        "image": launcher.image,
        "hostname": f"node{rank}",
        "command": shlex.split(" ".join(container_command(job, _rendezvous(job, rank)))),
        "working_dir": WORKSPACE,
        "user": job.user,
        "environment": {**container_environment(job), **dict.fromkeys(launcher.secret_environment)},
        "volumes": [str(mount) for mount in mounts(job, launcher.mounts)],
        "shm_size": f"{launcher.shared_memory_gib}gb",
        "read_only": launcher.read_only_root,
        "tmpfs": [TMPFS],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "stop_grace_period": f"{launcher.stop_seconds + 10}s",
        "restart": "no",
    }
    if launcher.unlimited_memlock:
        service["ulimits"] = {"memlock": {"soft": -1, "hard": -1}, "stack": 67108864}
    if launcher.infiniband:
        service |= {"cap_add": ["IPC_LOCK"], "devices": ["/dev/infiniband:/dev/infiniband"]}
    if launcher.device == "cuda":
        first = rank * launcher.nproc_per_node
        gpus = [str(gpu) for gpu in range(first, first + launcher.nproc_per_node)]
        device = {"driver": "nvidia", "device_ids": gpus, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return service


def _without_variables(node: Any) -> Any:
    """As it is, for compose, which would put variables of the caller where `$` is, in every text of the file."""
    if isinstance(node, dict):
        return {key: _without_variables(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_variables(value) for value in node]
    return node.replace("$", "$$") if isinstance(node, str) else node


def _rendezvous(job: Job[ComposeLauncher], rank: int) -> list[str]:
    launcher = job.launcher
    return rendezvous_options(
        job,
        backend=launcher.rendezvous,
        node_rank=str(rank),
        address="node0",
        port=str(launcher.port),
        is_host=str(int(rank == 0)),
    )
