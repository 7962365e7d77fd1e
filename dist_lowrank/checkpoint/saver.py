"""Saves while training goes on.

A save copies this rank's part to the CPU, which training waits for; a thread then writes it, opens it again and
compares, takes checksums, and gives the checkpoint its name when all ranks have done so. The thread talks to its peers
in a process group of its own. The next save waits for the last.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from dist_lowrank.checkpoint import folders
from dist_lowrank.checkpoint.errors import CheckpointError, refused, together
from dist_lowrank.checkpoint.manifest import (
    MANIFEST,
    SIDECAR,
    FileEntry,
    Manifest,
    Sidecar,
    TensorEntry,
    file_sha256,
    open_checkpoint,
    stored_blocks,
    to_json,
)
from dist_lowrank.checkpoint.shards import DTYPES, Shard, own_parts, stored_bytes
from dist_lowrank.checkpoint.storage import write_shards

RANDOM = "random.rank_{:05d}."


@dataclass(frozen=True)
class Saved:
    """How a save went. `problem` is the same on all ranks, unless ranks have lost each other."""

    step: int
    path: Path | None
    problem: str | None
    stored_bytes: int  # of this rank
    blocked_seconds: float  # training waited for so long
    seconds: float  # in all


class Saver:
    """Writes checkpoints to a folder. Collective over the default process group, from construction on."""

    def __init__(
        self,
        root: Path,
        *,
        asynchronous: bool = True,
        keep_last: int = 2,
        keep_every_steps: int | None = None,
        report: Callable[[Saved], None] = lambda saved: None,
    ) -> None:
        self.root, self.asynchronous = root, asynchronous
        self.keep_last, self.keep_every_steps, self.report = keep_last, keep_every_steps, report
        self.group = dist.new_group(backend="gloo")  # the thread's own, so that it never meets training's collectives
        self._copies: dict[str, Tensor] = {}  # kept between saves: new memory costs more than copying
        self._thread: threading.Thread | None = None
        self._outcome: Saved | None = None

    def save(
        self, shards: Mapping[str, Shard], random: Mapping[str, Tensor], sidecar: Sidecar, *, began: float | None = None
    ) -> None:
        """Saves; returns when everything is copied or, if not asynchronous, when the checkpoint has its name.

        Args:
            shards: what ranks hold of weights and state; see `TrainingState.to_save`.
            random: this rank's random state; the same names and shapes on all ranks.
            sidecar: without `tensors`; what rank 0 says counts.
            began: the value of `time.monotonic` since which training has been waiting; None: now.
        """
        started = time.monotonic() if began is None else began
        self.wait()
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        of_ranks = [
            {RANDOM.format(k) + name: Shard(t, tuple(t.shape), (0,) * t.ndim) for name, t in random.items()}
            for k in range(ranks)
        ]
        everything = {**shards, **{name: shard for each in of_ranks for name, shard in each.items()}}
        totals = {name: stored_bytes(shard) for name, shard in everything.items() if stored_bytes(shard)}
        entries = {name: _entry(everything[name]) for name in totals}
        parts = self._stage(own_parts(shards) | of_ranks[rank])
        sidecar = replace(sidecar, tensors=entries)

        device = next((shard.tensor.device for shard in shards.values() if shard.tensor.is_cuda), None)

        def work() -> None:
            path, problem = None, None
            try:
                if device is not None:
                    torch.cuda.set_device(device)  # else the thread would look at the first
                path = self._write(parts, totals, sidecar)
            except Exception as error:
                problem = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            size = sum(part.tensor.nbytes for part in parts.values())
            self._outcome = Saved(sidecar.step, path, problem, size, blocked_seconds, time.monotonic() - started)

        if self.asynchronous:
            blocked_seconds = time.monotonic() - started
            self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            blocked_seconds = 0.0  # not yet known
            work()
            assert self._outcome is not None
            self._outcome = replace(self._outcome, blocked_seconds=self._outcome.seconds)
            self.poll()

    @property
    def copies(self) -> list[Tensor]:
        """What the last save copied to the CPU, kept for the next one to copy into."""
        return [*self._copies.values()]

    def poll(self) -> None:
        """Reports a save that has ended since the last call."""
        if self._outcome is not None and (self._thread is None or not self._thread.is_alive()):
            outcome, self._outcome, self._thread = self._outcome, None, None
            self.report(outcome)

    def wait(self) -> None:
        """Until what is being saved is saved."""
        if self._thread is not None:
            self._thread.join()
        self.poll()

    def _stage(self, parts: Mapping[str, Shard]) -> dict[str, Shard]:
        """Copies on the CPU, which training cannot change."""
        staged = {}
        for name, part in parts.items():
            source = part.tensor.detach()
            copy = self._copies.get(name)
            if copy is None or copy.shape != source.shape or copy.dtype != source.dtype:
                copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._copies[name] = copy
            copy.copy_(source, non_blocking=True)
            staged[name] = replace(part, tensor=copy)
        if any(part.tensor.is_cuda for part in parts.values()):
            torch.cuda.synchronize()
        return staged

    def _write(self, parts: Mapping[str, Shard], totals: Mapping[str, int], sidecar: Sidecar) -> Path:
        first = dist.get_rank(self.group) == 0
        temporary = None
        try:
            temporary = together(self.group, lambda: folders.begin(self.root, sidecar.step) if first else None)[0]
            assert temporary is not None
            write_shards(temporary, parts, totals, self.group)
            written = together(self.group, lambda: self._read_back(temporary, parts))
            files = {name: entry for each in written for name, entry in each.items()}
            done = together(self.group, lambda: self._commit(temporary, files, sidecar) if first else None)[0]
            assert done is not None
            return done
        except Exception:
            if first and temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _read_back(self, folder: Path, parts: Mapping[str, Shard]) -> dict[str, FileEntry]:
        """Opens what this rank has written, compares every bit, and takes checksums."""
        found, entries = set(), {}
        for path in sorted(folder.glob(f"shard-{dist.get_rank(self.group) + 1:05d}-*")):
            for name, _, (offset, _) in stored_blocks(path):
                if name not in parts or parts[name].offset != offset:
                    raise refused(path, f"{name!r} was written at {offset}")
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                    if not _same_bits(file.get_tensor(name), parts[name].tensor):
                        raise refused(path, f"{name!r} does not read as it was written")
                    found.add(name)
            entries[path.name] = FileEntry(path.stat().st_size, file_sha256(path))
        if found != parts.keys():
            raise refused(folder, f"{sorted(parts.keys() - found)[0]!r} was not written")
        return entries

    def _commit(self, folder: Path, files: dict[str, FileEntry], sidecar: Sidecar) -> Path:
        folders.write_durably(folder / SIDECAR, to_json(sidecar))
        path = folder / SIDECAR
        files |= {SIDECAR: FileEntry(path.stat().st_size, file_sha256(path))}
        folders.write_durably(folder / MANIFEST, to_json(Manifest(files)))
        open_checkpoint(folder)
        final = folders.commit(folder)
        folders.retire(self.root, self.keep_last, self.keep_every_steps)
        return final


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _entry(shard: Shard) -> TensorEntry:
    return TensorEntry(DTYPES[shard.tensor.dtype], list(shard.shape))
