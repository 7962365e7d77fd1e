"""A real Slurm on one machine: a controller and node daemons of Debian's packages, each on a virtual host of its own.

    with slurm_cluster(["node0", "node1"]) as slurm:
        slurm.run("sbatch", "job.sh")

or by hand, until Enter is pressed, with commands in another terminal as it prints them:

    python tests/cluster/slurm.py

Needs root, and the packages `slurmctld slurmd slurm-client munge`, which `slurm.py --install` installs. It starts a
`munged` of its own with a key of its own, keeps everything in a temporary folder, and ends and removes all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from cluster import hosts as virtual

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
CONTROLLER = "controller"
CONFIGURATION = """\
ClusterName=lowrank
SlurmctldHost={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# No control groups and no accounting: those of the machine are not ours.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
# Tests do not wait: a lost node is noticed after 15 seconds, and a node that comes back is taken again.
ReturnToService=2
SlurmdTimeout=15
NodeName={nodes} CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """What this machine lacks for a cluster, in words; empty: nothing."""
    if missing := missing_programs():
        return f"needs Debian's packages {' '.join(PACKAGES)} (`make setup-slurm`): no {', '.join(missing)}"
    return virtual.why_not()


def missing_programs() -> list[str]:
    return [program for program in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(program) is None]


def install() -> None:
    """Installs the packages; their own services are not started, and not needed."""
    if not missing_programs():
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
    if subprocess.run(command, env=environment).returncode:
        subprocess.run(["apt-get", "update"], check=True)
        subprocess.run(command, env=environment, check=True)


@dataclass
class Slurm:
    """A cluster that is there until the end of `slurm_cluster`."""

    hosts: virtual.VirtualHosts
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, folder: Path | None = None, host: str = CONTROLLER) -> str:
        """Runs a client's command on the controller's host and returns what it printed.

        Raises:
            RuntimeError: if it fails, with what it said.
        """
        called = subprocess.run(
            self.hosts.command(host, command), env=self.environment, cwd=folder, capture_output=True, text=True
        )
        if called.returncode:
            raise RuntimeError(f"{shlex.join(command)}: exit code {called.returncode}\n{called.stdout}{called.stderr}")
        return called.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job, by Slurm's names, such as JobState and Restarts."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_node(self, name: str) -> None:
        command = self.hosts.command(name, ["slurmd", "-N", name])
        subprocess.run(command, env=self.environment, check=True, start_new_session=True)

    def kill_node(self, name: str) -> None:
        """As if its power failed: the daemon and everything that a job runs on the host."""
        self.hosts.kill_processes(name)

    def wait_for_nodes(self, timeout_seconds: float = 60) -> None:
        """Until every node is idle."""
        deadline = time.monotonic() + timeout_seconds
        while set((states := self.run("sinfo", "--noheader", "--Node", "--format=%T")).split()) != {"idle"}:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nodes are {states.split()} after {timeout_seconds:.0f} seconds; see {self.folder}")
            time.sleep(0.2)


@contextlib.contextmanager
def slurm_cluster(nodes: Sequence[str], *, cpus: int = 2, latency_milliseconds: float = 0) -> Iterator[Slurm]:
    """Starts a cluster whose nodes are idle, and ends it.

    Args:
        nodes: names of the hosts that run jobs.
        cpus: that each node claims to have, whatever the machine has.
        latency_milliseconds: of the network, one way.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lowrank-slurm-")))
        hosts = stack.enter_context(
            virtual.virtual_hosts([CONTROLLER, *nodes], latency_milliseconds=latency_milliseconds)
        )
        (folder / "state").mkdir()
        for name in nodes:
            (folder / f"spool.{name}").mkdir()
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                controller=CONTROLLER,
                folder=folder,
                nodes=",".join(nodes),
                cpus=cpus,
            )
        )
        slurm = Slurm(hosts, folder)
        _start_munge(folder, stack)
        try:
            subprocess.run(hosts.command(CONTROLLER, ["slurmctld"]), env=slurm.environment, check=True)
            for name in nodes:
                slurm.start_node(name)
            slurm.wait_for_nodes()
            yield slurm
            slurm.run("scontrol", "shutdown")
        except BaseException:
            for log in sorted(folder.glob("*.log")):
                print(f"{log.name}:\n{log.read_text()}")
            raise


def _start_munge(folder: Path, stack: contextlib.ExitStack) -> None:
    """The daemon that signs messages: one for all hosts, because they share files."""
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    files = {"key-file": key, **{f"{name}-file": folder / f"munge.{name}" for name in ("pid", "log", "seed")}}
    paths = [f"--{name}={path}" for name, path in files.items()]
    # --force: it warns that others may not enter a temporary folder; there are no others.
    subprocess.run(
        ["munged", "--force", f"--socket={folder / 'munge.socket'}", *paths], check=True, capture_output=True
    )
    stack.callback(os.kill, int((folder / "munge.pid").read_text()), signal.SIGTERM)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A Slurm cluster on this machine, until Enter is pressed.")
    parser.add_argument("--install", action="store_true", help="only install Debian's packages, if they are missing")
    parser.add_argument("--nodes", type=int, default=2)
    options = parser.parse_args()
    if options.install:
        install()
    elif reason := why_not():
        sys.exit(f"error: {reason}")
    else:
        with slurm_cluster([f"node{number}" for number in range(options.nodes)]) as slurm:
            enter = shlex.join(slurm.hosts.command(CONTROLLER, ["bash"]))
            print(f"{slurm.run('sinfo')}\nSLURM_CONF={slurm.folder}/slurm.conf {enter}")
            input("press Enter to end the cluster ")
