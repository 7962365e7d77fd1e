"""A switch in user space that keeps every frame for a while: latency where the kernel has no `netem`.

    python tests/cluster/delayed_switch.py MILLISECONDS NAMESPACE...

makes a TAP interface `eth0` in each network namespace, prints `ready`, and forwards frames between them, each
MILLISECONDS later, until its standard input is closed. It limits no rate: `tc` does, on the interfaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import sys
import threading
import time
from collections import deque

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02  # the kernel hands over up to 64 KB at once, which keeps up with a gigabit
CLONE_NEWNET = 0x40000000
HEADER_BYTES = 10  # of `struct virtio_net_hdr`, before every frame
FRAME_BYTES = 70_000  # at most


def main(delay_seconds: float, namespaces: list[str]) -> None:
    ports = [open_tap(namespace) for namespace in namespaces]
    print("ready", flush=True)
    forward(ports, delay_seconds, until=sys.stdin.fileno())


def open_tap(namespace: str) -> int:
    """A descriptor of a new TAP `eth0` in a namespace. The interface lives as long as the descriptor."""
    opened: list[int] = []

    def open_inside() -> None:  # a thread has a namespace of its own
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{namespace}") as file:
            if libc.setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"namespace {namespace}")
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
        opened.append(tap)

    thread = threading.Thread(target=open_inside)
    thread.start()
    thread.join()
    return opened[0]


def forward(ports: list[int], delay_seconds: float, until: int) -> None:
    """Moves frames until `until` is readable, which the end of a pipe is."""
    waiting: deque[tuple[float, int, bytes]] = deque()  # due time, port it came from, frame
    port_of_address: dict[bytes, int] = {}
    while True:
        # `select` waits for microseconds; the others round up to milliseconds.
        timeout_seconds = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([until, *ports], [], [], timeout_seconds)
        if until in readable:
            return
        for port in readable:
            for _ in range(64):
                try:
                    frame = os.read(port, FRAME_BYTES)
                except BlockingIOError:
                    break
                port_of_address[frame[HEADER_BYTES + 6 : HEADER_BYTES + 12]] = port
                waiting.append((time.monotonic() + delay_seconds, port, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, source, frame = waiting.popleft()
            target = port_of_address.get(frame[HEADER_BYTES : HEADER_BYTES + 6])
            for port in [target] if target is not None else [each for each in ports if each != source]:
                # The interface is down, or its queue full: the frame is lost, as in a real network.
                with contextlib.suppress(OSError):
                    os.write(port, frame)


if __name__ == "__main__":
    main(float(sys.argv[1]) / 1e3, sys.argv[2:])
