"""A prepared run that is to be started somewhere: what every renderer needs to know, and the parts that they share.

A renderer has two functions: `render(job)` returns the texts of the files by name, `commands(job)` what starts them.
Both are pure; nothing of this machine is in a file unless it is in the job.
"""

from __future__ import annotations

import shlex
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from dist_lowrank.config import RunConfig
from dist_lowrank.config.launchers import ComposeLauncher, KubernetesLauncher, Nodes, RenderingLauncher

AnyLauncher = TypeVar("AnyLauncher", bound=RenderingLauncher, covariant=True)

# SIGINT is not for torchrun: `dist_lowrank.torchrun` makes a SIGTERM of it, as ranks take a second SIGINT for an order.
SIGNALS = "SIGTERM,SIGHUP,SIGQUIT,SIGUSR1"


ONE_NODE = ["--nnodes 1"]  # `dist_lowrank.torchrun` then has its rendezvous on loopback


@dataclass(frozen=True)
class Job(Generic[AnyLauncher]):
    """One attempt of a run, as its launcher will see it."""

    config: RunConfig
    launcher: AnyLauncher  # of the configuration, with its type
    run: str  # the run's folder, relative to the work directory or absolute
    attempt: int
    work_directory: str  # absolute; relative paths of the configuration start here
    python: str  # this command's own
    user: str  # uid:gid of processes in containers

    @property
    def name(self) -> str:
        """Of the run, in characters that every scheduler and container engine takes."""
        folder = self.run.rstrip("/").rpartition("/")[2].lower()
        plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in folder)
        short = plain if len(plain) <= 40 else f"{plain[:23].rstrip('-')}-{plain[-16:].lstrip('-')}"
        return short if short[0].isalpha() else f"run-{short}"

    @property
    def folder(self) -> str:
        """Where the rendered files lie, as `run`."""
        return f"{self.run}/attempt-{self.attempt}/launch"

    @property
    def port(self) -> int:
        """A port of the rendezvous that other runs hardly have: 20000 to 29999."""
        return 20000 + zlib.crc32(self.name.encode()) % 10000


def environment(job: Job[RenderingLauncher], run: str) -> dict[str, str]:
    """The variables that the ranks need, without secrets.

    Args:
        run: the run's folder as the ranks see it.
    """
    launcher = job.launcher
    variables = {"OMP_NUM_THREADS": str(launcher.threads), "PYTHONUNBUFFERED": "1"}
    interface = launcher.interface or ("lo" if launcher.node_count == 1 else None)
    if interface is not None:
        variables["GLOO_SOCKET_IFNAME"] = interface
    if launcher.device == "cuda":
        variables |= {
            "NCCL_SOCKET_IFNAME": interface or "^docker,lo,veth",
            "NCCL_DEBUG": "WARN",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        }
        if launcher.flight_recorder_entries:
            variables |= {
                "TORCH_FR_BUFFER_SIZE": str(launcher.flight_recorder_entries),
                "TORCH_FR_DUMP_TEMP_FILE": f"{run}/flight_recorder/rank_",
                "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            }
    else:
        variables["DS_ACCELERATOR"] = "cpu"
    return variables | launcher.environment


def torchrun_options(job: Job[RenderingLauncher], rendezvous: Sequence[str]) -> list[str]:
    """torchrun's options for one node, in groups that fit on a line each.

    Args:
        rendezvous: those about how the nodes find each other.
    """
    launcher = job.launcher
    return [
        f"--nproc-per-node {launcher.nproc_per_node}",
        *rendezvous,
        f"--max-restarts {launcher.max_restarts}",
        f"--signals-to-handle {SIGNALS} --shutdown-timeout {launcher.stop_seconds}",
    ]


def rendezvous_options(
    job: Job[Nodes | ComposeLauncher | KubernetesLauncher],
    *,
    backend: str,
    node_rank: str,
    address: str,
    port: str,
    nodes: str | None = None,
    is_host: str | None = None,
) -> list[str]:
    """How the nodes of a job find each other. Arguments are shell words, so a script may pass variables of its own.

    Args:
        nodes: how many, or MIN:MAX; None: as many as the launcher has.
        is_host: with c10d, whether this node opens the rendezvous: "1" or "0"; None: by comparing names.
    """
    count, join_timeout_seconds = job.launcher.node_count, job.launcher.join_timeout_seconds
    if count == 1:
        return ONE_NODE
    nodes = nodes or str(count)
    if backend == "static":
        return [
            f"--nnodes {nodes} --node-rank {node_rank} --master-addr {address} --master-port {port}",
            f"--rdzv-backend static --rdzv-id {job.name} --rdzv-conf timeout={join_timeout_seconds}",
        ]
    host = "" if is_host is None else f",is_host={is_host}"
    return [
        f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint {address}:{port} --rdzv-id {job.name}",
        f"--rdzv-conf join_timeout={join_timeout_seconds}{host}",
    ]


def worker_command(job: Job[RenderingLauncher], run: str) -> str:
    """What torchrun starts once per process: a rank that is configured as the job's attempt.

    Args:
        run: the run's folder as the ranks see it, as a shell word.
    """
    return f"-m dist_lowrank.worker {run} --of-attempt {job.attempt}"


def node_script(
    job: Job[RenderingLauncher], about: str, python: str, rendezvous: Sequence[str], prepare: Sequence[str] = ()
) -> str:
    """A bash script that is one node of the run.

    Args:
        about: what to say at its top.
        python: on the node.
        prepare: further lines, before the command.
    """
    lines = ["#!/usr/bin/env bash", *(f"# {line}" for line in about.splitlines()), "set -euo pipefail"]
    lines.append(f"cd {shlex.quote(job.work_directory)}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment(job, job.run).items()]
    lines += [*needed_secrets(job.launcher), *prepare]
    command = [
        f"exec {shlex.quote(python)} -m dist_lowrank.torchrun",
        *torchrun_options(job, rendezvous),
        worker_command(job, shlex.quote(job.run)),
    ]
    return "\n".join(lines) + "\n" + " \\\n    ".join(command) + "\n"


def needed_secrets(launcher: RenderingLauncher) -> list[str]:
    """Lines of a script that end it where a secret is missing."""
    return [f': "${{{name}:?is not set here; no file holds it}}"' for name in launcher.secret_environment]


def joined(directory: str, path: str) -> str:
    """A path that may be relative to a directory, absolute; works for paths of other machines."""
    return path if path.startswith("/") else f"{directory.rstrip('/')}/{path}"
