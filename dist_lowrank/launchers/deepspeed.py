"""`launcher=deepspeed`: a hostfile, and DeepSpeed's launcher as the way to start one torchrun on each host."""

from __future__ import annotations

import shlex

from dist_lowrank.config.launchers import DeepSpeedLauncher
from dist_lowrank.launchers.job import Job, joined, node_script, rendezvous_options


def render(job: Job[DeepSpeedLauncher]) -> dict[str, str]:
    """`hostfile`; `node.sh` for each host; `start.sh`, which DeepSpeed's launcher does the rest for."""
    launcher = job.launcher
    run = job.run.rpartition("/")[2]
    node = node_script(
        job,
        f"One node of {run}. DeepSpeed's launcher starts it on each host, as one process, with RANK, MASTER_ADDR and\n"
        "MASTER_PORT. By hand: RANK=0 (1, 2, ...) MASTER_ADDR=(the first host) MASTER_PORT=(a port) bash node.sh",
        launcher.python or job.python,
        _rendezvous(job),
        prepare=["unset CUDA_VISIBLE_DEVICES  # DeepSpeed's launcher shows its one process one GPU"],
    )
    alone = " --no_ssh --node_rank 0" if launcher.node_count == 1 else ""
    command = [
        f"exec {shlex.join(launcher.command)} --hostfile {shlex.quote(_path(job, 'hostfile'))} --num_gpus 1",
        f"--launcher {launcher.transport} --master_addr {launcher.hosts[0]} --master_port {launcher.port or job.port}",
        f'--no_local_rank --no_python{alone} "$@"',
        f"bash {shlex.quote(_path(job, 'node.sh'))}",
    ]
    start = f"""\
#!/usr/bin/env bash
# {run} on the hosts of the hostfile, from any of them. Or on each by itself, with --no_ssh --node_rank 0 (1, ...).
# Whether to start it again: attempt-N/stopped.json and FINISHED in the run's folder (docs/faults.md).
set -euo pipefail
"""
    return {
        "hostfile": "".join(f"{host} slots={launcher.nproc_per_node}\n" for host in launcher.hosts),
        "node.sh": node,
        "start.sh": start + " \\\n    ".join(command) + "\n",
    }


def commands(job: Job[DeepSpeedLauncher]) -> list[list[str]]:
    """Starts all hosts."""
    return [["bash", _path(job, "start.sh")]]


def _path(job: Job[DeepSpeedLauncher], name: str) -> str:
    return f"{joined(job.work_directory, job.folder)}/{name}"


def _rendezvous(job: Job[DeepSpeedLauncher]) -> list[str]:
    launcher = job.launcher
    # DeepSpeed's launcher only announces its port; torchrun is who opens it.
    return rendezvous_options(
        job,
        backend=launcher.rendezvous,
        node_rank='"$RANK"',
        address='"$MASTER_ADDR"',
        port='"$MASTER_PORT"',
        is_host='"$((RANK == 0))"',
    )
