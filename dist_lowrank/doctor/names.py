"""Names, addresses and ports of this machine and of other nodes."""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import os
import socket
import threading
from collections.abc import Collection, Sequence
from pathlib import Path

from dist_lowrank.doctor.items import Item

_SECONDS = 2.0  # for a name service to answer
_LISTENS = "0A"  # the state of a listening socket in /proc/net/tcp


@functools.cache  # where nobody answers, each question takes its seconds
def resolve(name: str) -> list[str]:
    """The addresses of a name, those of version 4 first; none if it has none or nobody answers within seconds."""
    found: list[str] = []

    def ask() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found.extend(str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))

    thread = threading.Thread(target=ask, daemon=True)  # getaddrinfo has no time-out
    thread.start()
    thread.join(_SECONDS)
    return sorted(dict.fromkeys(found), key=lambda address: ":" in address)


def is_own(address: str) -> bool:
    """Whether this machine can listen at an address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def check_own_name(*, others: bool = False) -> Item:
    """Whether this host's name leads to it: gloo tells the other ranks the address that it finds there.

    Args:
        others: there are other nodes, which cannot use a loopback address.
    """
    name = socket.gethostname()
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        return Item("own name", "ok", f"{name}; gloo uses the interface {interface} (GLOO_SOCKET_IFNAME)")
    remedy = "a line with this node's address and name in /etc/hosts, or GLOO_SOCKET_IFNAME=INTERFACE such as eth0"
    addresses = resolve(name)
    if not addresses:
        return Item("own name", "failed", f"{name} has no address, or no name service answers", remedy)
    found = f"{name} is {', '.join(addresses)}"
    if not any(map(is_own, addresses)):
        return Item("own name", "failed", f"{found}, which is not this machine", remedy)
    if others and all(map(is_loopback, addresses)):
        return Item("own name", "failed", f"{found}, where no other node can reach it", remedy)
    return Item("own name", "ok", found)


def check_port(port: int) -> Item:
    """Whether the rendezvous port is free, and if not, who can reach what listens there."""
    addresses = listening(port)
    if not addresses:
        return Item("rendezvous port", "ok", f"{port} is free")
    public = exposed(addresses, own_addresses())
    if public:
        return Item(
            "rendezvous port",
            "warning",
            f"something answers at the public address {', '.join(f'{address} port {port}' for address in public)}",
            "torch's rendezvous store asks for no password: keep the port closed to the outside by a firewall, or use "
            "a private network",
        )
    return Item(
        "rendezvous port",
        "warning",
        f"{port} is in use (at {', '.join(sorted(addresses))}), by a job on this node perhaps",
        "another port for the next job (torchrun --master-port or --rdzv-endpoint; here: --port)",
    )


def listening(port: int) -> set[str]:
    """The addresses at which something on this machine listens; `0.0.0.0` and `::` are all of them."""
    found = set()
    for file in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        lines = file.read_text().splitlines()[1:] if file.exists() else []
        for _, local, _, state, *_ in map(str.split, lines):
            address, _, number = local.partition(":")
            if state == _LISTENS and int(number, 16) == port:
                words = [bytes.fromhex(address[place : place + 8])[::-1] for place in range(0, len(address), 8)]
                found.add(socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, b"".join(words)))
    return found


def exposed(addresses: Collection[str], own: Sequence[str]) -> list[str]:
    """Those of this machine's own addresses that are public and that a listener at `addresses` answers on."""
    everywhere = "0.0.0.0" in addresses or "::" in addresses
    reached = own if everywhere else [address for address in own if address in addresses]
    return [address for address in reached if ipaddress.ip_address(address).is_global]


def own_addresses() -> list[str]:
    """Of the host's name, and those with which this machine would talk to the rest of the world."""
    found = [address for address in resolve(socket.gethostname()) if is_own(address)]
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # reserved for documents
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))  # sends nothing: it only asks for a route
            found.append(probe.getsockname()[0])
    return [address.partition("%")[0] for address in dict.fromkeys(found)]


def why_not(error: OSError) -> str:
    """A failed connection in words, and so what to look at."""
    if isinstance(error, TimeoutError):
        return "no answer: the node is down, or a firewall drops packets"
    if error.errno == errno.ECONNREFUSED:
        return "connection refused: nothing listens there"
    return error.strerror or str(error)
