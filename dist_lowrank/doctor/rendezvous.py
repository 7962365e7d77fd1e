"""The store on node 0, through which nodes meet: hosted at that node's address alone, joined with a time-out."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from datetime import timedelta
from typing import TYPE_CHECKING

from dist_lowrank.doctor.items import Item
from dist_lowrank.doctor.names import exposed, own_addresses
from dist_lowrank.doctor.nodes import Place, connect, listen

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_PREFIX = "dist_lowrank.doctor"  # of keys: the store may turn out to be a training's


class NoMeeting(Exception):
    """The store cannot be hosted or joined."""

    def __init__(self, item: Item) -> None:
        super().__init__(item.found)
        self.item = item


def host_store(place: Place) -> tuple[Store, int, Item]:
    """Hosts the store; returns it with its port and who can reach it.

    Raises:
        NoMeeting: if the port is taken.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    try:
        listener = listen(place, place.port)
    except OSError as error:
        found = f"{place.port}: {os.strerror(error.errno or 0)}"
        remedy = f"end what listens there (ss -ltnp 'sport = :{place.port}'), or the same other --port on all nodes"
        raise NoMeeting(Item("rendezvous port", "failed", found, remedy, place.own)) from error
    item, port = _check_listener(place, listener), int(listener.getsockname()[1])
    address = listener.getsockname()[0]  # not the name, which may lead nowhere
    store = TCPStore(
        "127.0.0.1" if address == "0.0.0.0" else address,
        port,
        is_master=True,
        timeout=timedelta(seconds=place.timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return PrefixStore(_PREFIX, store), port, item


def join_store(place: Place) -> Store:
    """Joins the store of node 0.

    Raises:
        NoMeeting: if nothing answers there in time, or something else.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    host, timeout = place.nodes[0], timedelta(seconds=place.timeout_seconds)
    if reason := connect(host, place.port, place.timeout_seconds):
        raise NoMeeting(lost(place, host, f"port {place.port}: {reason}"))
    stores: list[Store] = []

    def join() -> None:
        with contextlib.suppress(RuntimeError):
            stores.append(TCPStore(host, place.port, is_master=False, timeout=timeout))

    thread = threading.Thread(target=join, daemon=True)  # torch waits for ever where something else listens
    thread.start()
    thread.join(place.timeout_seconds)
    if not stores:
        raise NoMeeting(lost(place, host, f"port {place.port}: what answers there is no rendezvous store"))
    return PrefixStore(_PREFIX, stores[0])


def lost(place: Place, node: str, reason: str) -> Item:
    """Another node that does not answer this one."""
    remedy = (
        f"start the same command on {node} within --timeout-seconds, look at what failed there, and open the port "
        "between the nodes"
    )
    return Item("rendezvous", "failed", f"{node} does not answer, {reason}", remedy, place.own)


def _check_listener(place: Place, listener: socket.socket) -> Item:
    """Whether the store on node 0 can be reached from the outside."""
    address = listener.getsockname()[0]
    if public := exposed([address], own_addresses()):
        return Item(
            "rendezvous port",
            "warning",
            f"the store answers at the public address {', '.join(public)}",
            "torch's rendezvous store asks for no password: keep the port closed to the outside by a firewall, or "
            "name nodes by their private addresses",
            place.own,
        )
    return Item("rendezvous port", "ok", f"{place.port} at {address}", node=place.own)
