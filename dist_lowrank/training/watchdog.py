"""Finds a rank that hangs, names it on all ranks and ends them; collectives alone wait, and then blame nobody.

A thread of each rank writes a sign of life to the store: where the rank is (`Position`) and how many collectives it
has begun. Rank 0 reads all of them, the others read rank 0's. A rank that stopped, or holds the interpreter lock, gives
no sign at all. One that runs but gets nowhere is the one that is behind: the others have begun a collective that it has
not.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dist_lowrank.training.position import Position

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]


@dataclass
class _Sign:
    """The last sign of life of a rank, and since when (of this rank's clock) it says the same."""

    content: dict[str, Any]
    alive_seconds: float
    progress_seconds: float

    @property
    def reached(self) -> tuple[int, int]:
        return self.content["collectives"], self.content["entered"]


class Watchdog:
    """Watches while it is entered as a context manager. Needs a process group.

    Args:
        store: that all ranks reach; the watchdog opens a connection of its own to it.
        timeout_seconds: without a sign of life, or without progress, before a rank counts as hanging.
        on_hang: called in the watchdog's thread with the text that names the rank; must end the process.
    """

    def __init__(
        self, store: Store, position: Position, timeout_seconds: float, on_hang: Callable[[str], object]
    ) -> None:
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=timeout_seconds))
        self._position, self._timeout_seconds, self._on_hang = position, timeout_seconds, on_hang
        self._interval_seconds = min(5.0, timeout_seconds / 8)
        self._beats = 0
        self._signs: dict[int, _Sign] = {}
        self._silent: list[dict[str, Any]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(self._timeout_seconds)

    def _watch(self) -> None:
        last_seconds = time.monotonic()
        try:
            while not self._ended.wait(self._interval_seconds):
                self._beat()
                if self._rank and self._store.check(["hang"]):
                    self._end(self._store.get("hang").decode())
                now_seconds = time.monotonic()
                self._read(now_seconds)
                if now_seconds - last_seconds > 3 * self._interval_seconds:
                    self._forgive(now_seconds)  # this rank was stopped, maybe all were
                last_seconds = now_seconds
                found = self._hanging(now_seconds)
                if found:
                    self._store.set("hang", found)
                    self._ended.wait(2.5 * self._interval_seconds)  # the others read it; this rank may hold the store
                    for content in self._silent:
                        _kill_sibling_soon(content)
                    self._end(found)
        except RuntimeError as error:
            # The store is gone, and with it the launcher or rank 0: collectives will fail. Or it does not answer.
            text = str(error).partition("\n")[0]
            if ("timeout" in text.lower() or "timed out" in text) and not self._ended.is_set():
                self._end(f"the store, in the launcher or on rank 0, does not answer: {text}")

    def _end(self, text: str) -> None:
        stack = "".join(traceback.format_stack(sys._current_frames()[threading.main_thread().ident or 0])[-8:])
        self._on_hang(f"{text}\nthis rank was in {self._position}:\n{stack}")

    def _beat(self) -> None:
        self._beats += 1
        sign = {
            "beat": self._beats,
            "where": str(self._position),
            "entered": self._position.entered,
            "collectives": _collectives_begun(),
            "host": platform.node(),
            "process": os.getpid(),
        }
        self._store.set(f"alive/{self._rank}", json.dumps(sign))

    def _read(self, now_seconds: float) -> None:
        for rank in range(self._world_size) if self._rank == 0 else (0,):
            if not self._store.check([f"alive/{rank}"]):
                continue  # it is about to begin
            content = json.loads(self._store.get(f"alive/{rank}"))
            before = self._signs.get(rank)
            sign = _Sign(content, now_seconds, now_seconds)
            if before is not None and before.reached == sign.reached:
                sign.progress_seconds = before.progress_seconds
                if before.content["beat"] == content["beat"]:
                    sign.alive_seconds = before.alive_seconds
            self._signs[rank] = sign

    def _forgive(self, now_seconds: float) -> None:
        for sign in self._signs.values():
            sign.alive_seconds = sign.progress_seconds = now_seconds

    def _hanging(self, now_seconds: float) -> str:
        """What hangs, in words; empty while nothing does."""
        limit, signs = now_seconds - self._timeout_seconds, self._signs
        watched = [sign.progress_seconds if self._rank == 0 else sign.alive_seconds for sign in signs.values()]
        if all(since >= limit for since in watched):
            return ""
        quiet = now_seconds - 3 * self._interval_seconds
        silent = {rank: sign for rank, sign in signs.items() if sign.alive_seconds < quiet}
        if silent:
            self._silent = [sign.content for sign in silent.values()]
            return _listed(silent, f"gave no sign of life for {self._timeout_seconds:.0f} seconds; last seen")
        last = min(sign.reached for sign in signs.values())
        behind = {rank: sign for rank, sign in signs.items() if sign.reached == last}
        if len(behind) == len(signs) and len(signs) > 1:
            return _listed(signs, f"all wait in the same place for {self._timeout_seconds:.0f} seconds (the network?):")
        return _listed(behind, f"got no further for {self._timeout_seconds:.0f} seconds while the others wait for it:")


def _listed(signs: dict[int, _Sign], what: str) -> str:
    return "\n".join(
        f"rank {rank} (process {sign.content['process']} on {sign.content['host']}) {what} in {sign.content['where']}"
        for rank, sign in sorted(signs.items())
    )


def _collectives_begun() -> int:
    """By this rank, in all process groups. torch counts them for its own diagnostics, under private names."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    begun = 0
    for group in groups:
        with contextlib.suppress(RuntimeError):  # a backend that does not count
            begun += group._get_sequence_number_for_group()
    return begun


def _kill_sibling_soon(content: dict[str, Any]) -> None:
    """Kills a process that hears no other signal, if the launcher of this rank started it too.

    A little later, so that the launcher first sees this rank end, which says why.
    """
    if content["host"] != platform.node():
        return
    with contextlib.suppress(OSError, IndexError):
        with open(f"/proc/{content['process']}/stat") as file:
            parent = int(file.read().rpartition(")")[2].split()[1])
        if parent == os.getppid():
            subprocess.Popen(["sh", "-c", f"sleep 2; kill -KILL {content['process']}"], start_new_session=True)
