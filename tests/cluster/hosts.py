"""Several hosts on one machine: network namespaces with own names and addresses on one limited network.

    with virtual_hosts(["node0", "node1"], megabits_per_second=100, latency_milliseconds=2) as hosts:
        subprocess.run(hosts.command("node0", ["ping", "-c1", "node1"]))
        hosts.cut_off("node1")

A host shares processes, users and files with the machine; it has a host name, an `/etc/hosts` and a network of its own,
from which no way leads out. Bandwidth is limited by `tc` (token bucket) on each host's interface, both ways; latency is
added by `delayed_switch.py`, without it the switch is a bridge of the kernel. Needs root, `iproute2` and `util-linux`.

What a test that was killed has left behind is removed by the next one, or by `python tests/cluster/hosts.py`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PREFIX = "lowrank"  # of the namespaces' names, before the process that made them
NAMESPACES = Path("/run/netns")
# Starts `enter HOST COMMAND...` on a host, as the same process.
ENTER = """\
host=$1; shift
exec nsenter --net={namespaces}-"$host" unshare --mount --uts sh -c \\
    'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"' sh {folder}/hosts "$host" "$@"
"""


def why_not() -> str:
    """What this machine lacks for virtual hosts, in words; empty: nothing."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("ip", "tc", "nsenter", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    made = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, text=True)
    return f"may not make namespaces: {made.stderr.strip()}" if made.returncode else ""


@dataclass(frozen=True)
class VirtualHosts:
    """Hosts that are there until the end of `virtual_hosts`."""

    names: Sequence[str]
    folder: Path

    @property
    def remote_shell(self) -> list[str]:
        """What takes a host and a command, as `ssh` does; the command runs as the same process."""
        return ["sh", str(self.folder / "enter")]

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        """What to start on this machine so that `command` runs on a host."""
        return [*self.remote_shell, name, *command]

    def cut_off(self, name: str) -> None:
        """Takes a host's link down: nothing reaches it, and nobody is told."""
        _run("ip", "-n", _namespace(name), "link", "set", "eth0", "down")

    def processes(self, name: str) -> list[str]:
        """The commands that run on a host."""
        commands = []
        for process in _processes(_namespace(name)):
            with contextlib.suppress(OSError):
                commands.append(Path(f"/proc/{process}/cmdline").read_text().replace("\0", " "))
        return commands

    def kill_processes(self, name: str) -> None:
        """Kills everything that runs on a host."""
        _end_processes(_namespace(name))


@contextlib.contextmanager
def virtual_hosts(
    names: Sequence[str], *, megabits_per_second: float | None = None, latency_milliseconds: float = 0
) -> Iterator[VirtualHosts]:
    """Makes hosts, and removes them with everything that runs on them.

    Args:
        names: host names.
        megabits_per_second: of each host's link, in each direction; None: no limit.
        latency_milliseconds: one way, between any two hosts.

    Raises:
        subprocess.CalledProcessError: if the system refuses; `why_not` says beforehand what is missing.
    """
    remove_left_behind()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX)))
        addresses = {name: f"10.77.0.{10 + number}" for number, name in enumerate(names)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (folder / "hosts").write_text("".join(f"{line}\n" for line in lines))
        (folder / "enter").write_text(ENTER.format(namespaces=NAMESPACES / _namespace("")[:-1], folder=folder))
        stack.callback(_remove, os.getpid())
        for name in names:
            _run("ip", "netns", "add", _namespace(name))
            _run("ip", "-n", _namespace(name), "link", "set", "lo", "up")
        if latency_milliseconds:
            _connect_with_latency(stack, names, latency_milliseconds)
        else:
            _connect(names)
        for name, address in addresses.items():
            _run("ip", "-n", _namespace(name), "address", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", _namespace(name), "link", "set", "eth0", "up")
            if megabits_per_second:
                _limit(_namespace(name), "eth0", megabits_per_second)
        if megabits_per_second and not latency_milliseconds:
            for number in range(len(names)):
                _limit(_namespace("switch"), f"port{number}", megabits_per_second)
        yield VirtualHosts(names, folder)


def _connect(names: Sequence[str]) -> None:
    """By a bridge of the kernel, in a namespace of its own."""
    switch = _namespace("switch")
    _run("ip", "netns", "add", switch)
    _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", switch, "link", "set", "bridge", "up")
    for number, name in enumerate(names):
        port = f"port{number}"
        _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", _namespace(name))
        _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")


def _connect_with_latency(stack: contextlib.ExitStack, names: Sequence[str], milliseconds: float) -> None:
    """By a process, which ends when this one does, because that closes its standard input."""
    script = Path(__file__).with_name("delayed_switch.py")
    command = [sys.executable, str(script), str(milliseconds), *map(_namespace, names)]
    switch = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    assert switch.stdout is not None
    if switch.stdout.readline() != b"ready\n":
        raise subprocess.CalledProcessError(switch.wait(), command)


def _limit(namespace: str, interface: str, megabits_per_second: float) -> None:
    # The burst is what passes in 5 ms, but at least what the kernel hands over at once; the queue is 50 ms deep.
    burst_bytes = max(65_536, int(megabits_per_second * 1e6 / 8 * 0.005))
    limit = ("rate", f"{megabits_per_second}mbit", "burst", str(burst_bytes), "latency", "50ms")
    _run("ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", interface, "root", "tbf", *limit)


def remove_left_behind() -> None:
    """Removes the hosts of processes that were killed before they could."""
    makers = {name.split("-")[1] for name in _namespaces()}
    for maker in makers:
        if not Path(f"/proc/{maker}").exists():
            _remove(int(maker))


def _remove(maker: int) -> None:
    """Ends what runs on the hosts of a process, and removes them."""
    own = [name for name in _namespaces() if name.startswith(f"{PREFIX}-{maker}-")]
    for name in own:
        _end_processes(name)
    for name in own:
        _run("ip", "netns", "delete", name)


def _end_processes(namespace: str) -> None:
    for attempt in range(100):
        running = _processes(namespace)
        if not running:
            return
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01 * attempt)


def _processes(namespace: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True)
    return [int(process) for process in found.stdout.split()]


def _namespace(name: str) -> str:
    return f"{PREFIX}-{os.getpid()}-{name}"


def _namespaces() -> list[str]:
    return [path.name for path in NAMESPACES.glob(f"{PREFIX}-*-*")]


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    remove_left_behind()
