"""The typed schema of the launchers: where the processes of a run are started, and with what around them."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from dist_lowrank.config.credentials import is_credential
from dist_lowrank.config.types import STRICT, NonNegativeInt, PositiveInt

# What is rendered into scripts unquoted, or read back by other programs, is kept to plain characters.
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:_-]*$", description="that is a host name or address")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9._/][A-Za-z0-9._:/@+-]*$", description="without spaces or quotes")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="the name of a variable")]
ObjectName = Annotated[
    str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$", description="of small letters, digits and '-'")
]
Path = Annotated[str, Field(pattern=r"^[^\x00-\x1f'\"$`\\]+$", description="a path without quotes, '$' or '\\'")]
Port = Annotated[int, Field(ge=1024, le=65535, strict=True)]


def _without_credentials(environment: dict[str, str]) -> dict[str, str]:
    for name, value in environment.items():
        if is_credential(name, value):
            raise ValueError(
                f"{name}: credentials are not allowed, they would be written into files; allowed: its name in "
                f"launcher.secret_environment, and the value in the environment of who starts the job"
            )
    return environment


Environment = Annotated[dict[VariableName, str], AfterValidator(_without_credentials)]


@dataclass(frozen=True, config=STRICT)
class LauncherConfig:
    """What all launchers have: the processes of one node, and how long they may take."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda when a GPU is visible
    nproc_per_node: PositiveInt | None = None  # null: all visible GPUs, or 2 on a CPU
    threads: PositiveInt | None = None  # per process; null: cores / processes
    timeout_seconds: PositiveInt = 600  # without progress, until a rank counts as hanging
    stop_seconds: PositiveInt = 120  # for ranks to save after a signal, before they are killed
    max_restarts: NonNegativeInt = 0  # after a rank failed, died or hung; resumes from the newest checkpoint

    @property
    def node_count(self) -> int:
        """The machines, containers or pods of a run."""
        return 1

    @property
    def world_sizes(self) -> tuple[int, ...] | None:
        """The numbers of processes that a run may have; None: what this machine has decides."""
        return None


@dataclass(frozen=True, config=STRICT)
class LocalLauncher(LauncherConfig):
    """The processes of a run on this machine, as children of the command."""

    name: Literal["local"] = "local"


@dataclass(frozen=True, config=STRICT)
class RenderingLauncher(LauncherConfig):
    """A launcher that writes files which start a run somewhere else, so that everything has to be known before."""

    device: Literal["cpu", "cuda"] = "cuda"
    nproc_per_node: PositiveInt = 8
    threads: PositiveInt = 1
    interface: Word | None = None  # of the network between nodes, such as eth0; null: NCCL's and gloo's own choice
    environment: Environment = Field(default_factory=dict)  # more variables of the processes
    secret_environment: tuple[VariableName, ...] = ()  # names only: taken from where the job starts, written nowhere
    flight_recorder_entries: NonNegativeInt = 2000  # NCCL's last operations, dumped when a collective hangs; 0: none
    accelerator: str | None = None  # such as h100 or 80GiB: what does not fit it is refused; null: nothing is planned

    @property
    def world_sizes(self) -> tuple[int, ...]:
        return (self.node_count * self.nproc_per_node,)


@dataclass(frozen=True, config=STRICT)
class Nodes(RenderingLauncher):
    """How the torchruns of several nodes find each other."""

    rendezvous: Literal["static", "c10d"] = "static"  # c10d: nodes may be lost and come back
    port: Port | None = None  # of the rendezvous, on the first node; null: one that depends on the run or the job
    join_timeout_seconds: PositiveInt = 600  # for all nodes to come


@dataclass(frozen=True, config=STRICT)
class Hosts(Nodes):
    """Nodes that are known by name."""

    hosts: Annotated[tuple[Host, ...], Field(min_length=1)] = ("localhost",)  # the first one hosts the rendezvous
    python: Path | None = None  # on the hosts; null: the path of this command's own
    work_directory: Path | None = None  # on the hosts; null: the current one, which they share

    @property
    def node_count(self) -> int:
        return len(self.hosts)

    @model_validator(mode="after")
    def _hosts_differ(self) -> Hosts:
        twice = sorted({host for host in self.hosts if self.hosts.count(host) > 1})
        if twice:
            raise ValueError(
                f"hosts: {json.dumps(self.hosts)} is not allowed, {', '.join(twice)} more than once; allowed: every "
                "host once, with one node each (its GPUs: launcher.nproc_per_node)"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class TorchrunLauncher(Hosts):
    """One torchrun on each of several hosts, from a script that can as well be started by hand."""

    name: Literal["torchrun"] = "torchrun"
    min_nodes: PositiveInt | None = None  # with c10d: go on with this many when hosts are lost; null: all are needed
    remote_shell: tuple[str, ...] = ("ssh", "-tt", "-o", "BatchMode=yes")  # starts `bash SCRIPT` on a host; []: here

    @property
    def world_sizes(self) -> tuple[int, ...]:
        fewest = self.min_nodes or self.node_count
        return tuple(nodes * self.nproc_per_node for nodes in range(fewest, self.node_count + 1))

    @model_validator(mode="after")
    def _nodes_can_be_fewer(self) -> TorchrunLauncher:
        if self.min_nodes is not None and (self.rendezvous != "c10d" or self.min_nodes > len(self.hosts)):
            raise ValueError(
                f"min_nodes: {self.min_nodes} is not allowed with launcher.rendezvous={self.rendezvous} and "
                f"{len(self.hosts)} hosts; allowed: null, or 1 to {len(self.hosts)} with launcher.rendezvous=c10d"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class SlurmLauncher(Nodes):
    """An sbatch script with one torchrun per node, which requeues itself when the run was stopped (exit code 75)."""

    name: Literal["slurm", "slurm_pyxis"] = "slurm"
    nodes: PositiveInt = 1
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time_limit_minutes: PositiveInt | None = None  # null: the partition's
    signal_seconds: PositiveInt = 300  # before the time limit: save and stop
    cpus_per_task: PositiveInt | None = None  # of a node's one task; null: threads x nproc_per_node
    memory_gib: NonNegativeInt | None = None  # per node; 0: all of it; null: the partition's
    exclusive: bool = False  # no other jobs on the nodes
    max_requeues: NonNegativeInt = 100
    inherited_environment: tuple[VariableName, ...] = (  # of who submits; Slurm's own variables come anyway
        "PATH",
        "HOME",
        "USER",
        "LANG",
        "LD_LIBRARY_PATH",
        "PYTHONPATH",
        "XDG_CACHE_HOME",
        "HF_HOME",
    )
    options: tuple[Annotated[str, Field(pattern=r"^--[a-z][^\x00-\x1f]*$", description="such as --nice=10")], ...] = ()
    python: Path | None = None  # on the nodes; null: the path of this command's own, or `python` in a container
    work_directory: Path | None = None
    image: Path | None = None  # slurm_pyxis: a .sqsh file, or registry#name:tag
    mounts: dict[Path, Path] = Field(default_factory=dict)  # slurm_pyxis: host path to path in the container

    @property
    def node_count(self) -> int:
        return self.nodes

    @model_validator(mode="after")
    def _image_is_of_pyxis(self) -> SlurmLauncher:
        if (self.image is None) == (self.name == "slurm_pyxis"):
            given, allowed = (
                ("null", "a .sqsh file or registry#name:tag")
                if self.image is None
                else (self.image, "null, or launcher=slurm_pyxis, which runs the nodes in containers")
            )
            raise ValueError(f"image: {given} is not allowed with launcher={self.name}; allowed: {allowed}")
        return self


@dataclass(frozen=True, config=STRICT)
class Container(RenderingLauncher):
    """What a container needs that a process has by itself."""

    device: Literal["cpu", "cuda"] = "cpu"
    nproc_per_node: PositiveInt = 2
    image: Word = "dist-lowrank:cpu"
    user: Annotated[str, Field(pattern=r"^[0-9]+:[0-9]+$", description="uid:gid")] | None = None  # null: who launches
    shared_memory_gib: PositiveInt = 8  # /dev/shm, for NCCL and data workers
    read_only_root: bool = True  # /tmp is a file system of its own


@dataclass(frozen=True, config=STRICT)
class HostContainer(Container):
    """A container that an engine on this machine starts."""

    unlimited_memlock: bool = True  # for RDMA, which pins memory
    infiniband: bool = False  # /dev/infiniband and the capability IPC_LOCK
    mounts: dict[Path, Path] = Field(default_factory=dict)  # more of the host, read-only, to a path in the container


@dataclass(frozen=True, config=STRICT)
class DockerLauncher(HostContainer):
    """One container on this machine."""

    name: Literal["docker"] = "docker"
    command: Annotated[tuple[Word, ...], Field(min_length=1)] = ("docker",)  # or podman
    network: Word = "bridge"


@dataclass(frozen=True, config=STRICT)
class ComposeLauncher(HostContainer):
    """Several containers on this machine as nodes, for trying out."""

    name: Literal["compose"] = "compose"
    command: Annotated[tuple[Word, ...], Field(min_length=1)] = ("docker", "compose")  # or docker-compose
    nodes: PositiveInt = 2
    rendezvous: Literal["static", "c10d"] = "static"
    port: Port = 29400
    join_timeout_seconds: PositiveInt = 600

    @property
    def node_count(self) -> int:
        return self.nodes


@dataclass(frozen=True, config=STRICT)
class KubernetesLauncher(Container):
    """Pods as nodes: a TrainJob of Kubeflow Trainer, or an Indexed Job where that is not installed."""

    name: Literal["kubernetes"] = "kubernetes"
    kind: Literal["trainjob", "job"] = "trainjob"
    command: Annotated[tuple[Word, ...], Field(min_length=1)] = ("kubectl",)
    namespace: ObjectName | None = None  # null: of kubectl's context
    nodes: PositiveInt = 1
    port: Port = 29400
    join_timeout_seconds: PositiveInt = 600
    claim: ObjectName = "runs"  # volume claim for run folders, mounted at /runs; all nodes write it
    data_claim: ObjectName | None = None  # volume claim for data, mounted at /data, read-only
    secret_name: ObjectName = "dist-lowrank"  # of a Secret with a key for each name in secret_environment
    cpus: PositiveInt | None = None  # per node; null: threads x nproc_per_node
    memory_gib: PositiveInt | None = None  # per node; null: no request
    rdma_resource: Word | None = None  # of the cluster's device plugin, such as rdma/hca_shared_devices_a
    node_selector: dict[Word, Word] = Field(default_factory=dict)
    max_failures: NonNegativeInt = 6  # of pods, by codes 1 and 76 and others; stops by code 75 do not count

    @property
    def node_count(self) -> int:
        return self.nodes


@dataclass(frozen=True, config=STRICT)
class DeepSpeedLauncher(Hosts):
    """DeepSpeed's launcher and hostfile start one torchrun on each host."""

    name: Literal["deepspeed"] = "deepspeed"
    transport: Literal["pdsh", "openmpi", "mpich", "impi", "slurm", "mvapich"] = "pdsh"  # between hosts
    command: Annotated[tuple[Word, ...], Field(min_length=1)] = ("deepspeed",)
