"""`launcher=torchrun`: a script for each of several hosts that share a file system."""

from __future__ import annotations

import shlex

from dist_lowrank.config.launchers import TorchrunLauncher
from dist_lowrank.launchers.job import Job, joined, node_script, rendezvous_options


def render(job: Job[TorchrunLauncher]) -> dict[str, str]:
    """`node-0.sh` for the first host, and so on."""
    hosts, run = job.launcher.hosts, job.run.rpartition("/")[2]
    together = "" if len(hosts) == 1 else " Start the scripts of all hosts, in any order."
    return {
        script_name(rank): node_script(
            job,
            f"Node {rank} of {len(hosts)} of {run}, for host {host}.{together}\n"
            "Exit codes: docs/faults.md. After 75, 1 or 76 the same scripts continue the run.",
            job.launcher.python or job.python,
            _rendezvous(job, rank),
        )
        for rank, host in enumerate(hosts)
    }


def commands(job: Job[TorchrunLauncher]) -> list[list[str]]:
    """One per host."""
    folder = joined(job.work_directory, job.folder)
    shell = list(job.launcher.remote_shell)
    started = []
    for rank, host in enumerate(job.launcher.hosts):
        script = f"{folder}/{script_name(rank)}"
        started.append([*shell, host, "bash", shlex.quote(script)] if shell else ["bash", script])
    return started


def script_name(node_rank: int) -> str:
    """Of a node's script."""
    return f"node-{node_rank}.sh"


def _rendezvous(job: Job[TorchrunLauncher], rank: int) -> list[str]:
    launcher, nodes = job.launcher, job.launcher.node_count
    return rendezvous_options(
        job,
        backend=launcher.rendezvous,
        nodes=f"{launcher.min_nodes or nodes}:{nodes}" if launcher.rendezvous == "c10d" else None,
        node_rank=str(rank),
        address=launcher.hosts[0],
        port=str(launcher.port or job.port),
        is_host=str(int(rank == 0)),
    )
