"""The list of nodes: which of them this machine is, and whether each can be found and reached."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dist_lowrank.config import ConfigError
from dist_lowrank.doctor.items import Item
from dist_lowrank.doctor.names import is_loopback, is_own, own_addresses, resolve, why_not

_RETRY_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Place:
    """One node among all; node 0 is where they meet."""

    nodes: Sequence[str]  # names or addresses, in the same order on every node
    rank: int
    port: int  # of the store on node 0
    timeout_seconds: float  # for every node to answer

    @property
    def own(self) -> str:
        return self.nodes[self.rank]

    @property
    def is_one_machine(self) -> bool:
        """Whether the nodes can talk over loopback addresses."""
        return all(map(is_loopback, resolve(self.nodes[0])))


def find_place(nodes: Sequence[str], rank: int | None, port: int, timeout_seconds: float) -> Place:
    """This machine's place in the list.

    Args:
        rank: as the user gave it; None: the node whose address is this machine's.

    Raises:
        ConfigError: for an empty or repeated name, or if the place cannot be told.
    """
    text = ",".join(nodes)
    if not all(nodes) or len(set(nodes)) < len(nodes):
        raise ConfigError(f"--nodes {text}: is not allowed; allowed: each node once, such as node1,node2")
    if rank is None:
        own = [number for number, node in enumerate(nodes) if any(map(is_own, resolve(node)))]
        if len(own) != 1:
            which = "none" if not own else " and ".join(nodes[number] for number in own)
            raise ConfigError(
                f"--nodes {text}: {which} of them {'are' if len(own) > 1 else 'is'} this machine "
                f"({socket.gethostname()}: {', '.join(own_addresses())}); allowed: one, or say which with --node-rank"
            )
        (rank,) = own
    if not 0 <= rank < len(nodes):
        raise ConfigError(f"--node-rank: {rank} is not allowed; allowed: 0 to {len(nodes) - 1}")
    return Place(nodes, rank, port, timeout_seconds)


def check_names(place: Place) -> Item:
    """Whether this node can find the others."""
    found = {node: resolve(node) for node in place.nodes}
    lost = [node for node, addresses in found.items() if not addresses]
    if lost:
        remedy = "the names as DNS or /etc/hosts know them, or addresses"
        return Item("names of nodes", "failed", f"no address for {', '.join(lost)}", remedy, place.own)
    return Item("names of nodes", "ok", ", ".join(f"{n} is {a[0]}" for n, a in found.items()), node=place.own)


def listen(place: Place, port: int) -> socket.socket:
    """A socket where the other nodes expect this one: at its address alone, where they can reach that.

    Raises:
        OSError: such as for a port that is taken.
    """
    addresses = [address for address in resolve(place.own) if is_own(address)]
    if not addresses or (all(map(is_loopback, addresses)) and not place.is_one_machine):
        return socket.create_server(("", port))  # /etc/hosts has a loopback address for the own name, say
    family = socket.AF_INET6 if ":" in addresses[0] else socket.AF_INET
    return socket.create_server((addresses[0], port), family=family, backlog=1024)


def connect(address: str, port: int, seconds: float) -> str:
    """Connects, again and again where nothing listens yet; returns why it did not work, or nothing."""
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((address, port), timeout=max(0.1, left)):
                return ""
        except OSError as error:
            reason = why_not(error)
        if deadline - time.monotonic() < _RETRY_SECONDS:
            return reason
        time.sleep(_RETRY_SECONDS)


def check_reach(place: Place, ports: Sequence[int]) -> Item:
    """Whether this node can open connections to all others, as gloo and NCCL do between any two.

    Args:
        ports: by node, at which it listens.
    """
    lost = []
    for rank, (node, port) in enumerate(zip(place.nodes, ports, strict=True)):
        if rank != place.rank and (reason := connect(node, port, min(5.0, place.timeout_seconds))):
            lost.append(f"{node} port {port} ({reason})")
    if lost:
        remedy = "open all ports between the nodes, or NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME with an open network"
        return Item("reachable", "failed", f"not from here: {', '.join(lost)}", remedy, place.own)
    return Item("reachable", "ok", "all others, from here", node=place.own)
