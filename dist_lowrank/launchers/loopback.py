"""The rendezvous of a single node, which only this machine can reach: it has neither password nor encryption."""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

ADDRESS = "127.0.0.1"


def open_store() -> TCPStore:
    """The server of a store that listens on loopback only; left to itself, torch listens on all interfaces.

    Keep it as long as the node runs. torch's static rendezvous uses the server that its process has on the port.
    """
    listener = socket.create_server((ADDRESS, 0))
    return TCPStore(
        ADDRESS,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(minutes=10),
        master_listen_fd=listener.detach(),
    )


def stay_on_loopback() -> None:
    """Sets what keeps the collectives of ranks that this process starts on loopback, unless someone has set it."""
    if sys.platform == "linux":
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
