"""Profiles of some steps, and snapshots of a GPU's memory: on demand, and when it runs out."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dist_lowrank.exit_codes import RunFailure

STEPS_ON_DEMAND = 3
_LOOKING_SECONDS = 1.0  # between two looks for the file
_MOST_ALLOCATIONS = 100_000  # that the history of a GPU's memory remembers


class Profiler:
    """Traces steps of this rank into `FOLDER/steps_10_to_12/rank0_trace.json.gz`, for Perfetto or chrome://tracing.

    On a GPU a snapshot of its memory, `rank0_memory.pickle`, is written beside it. A trace holds operators, kernels,
    collectives and the optimizer's step. The traced steps are slower, and what is logged of them shows it.

    Args:
        folder: made when there is something to write.
        steps: the first and the last to trace; None: none.
        demand: whoever makes this file asks for the next steps; None on all ranks but one, which asks for all.
    """

    def __init__(
        self, folder: Path, rank: int, device: torch.device, steps: tuple[int, int] | None, demand: Path | None
    ) -> None:
        self._folder, self._rank, self._device, self._demand = folder, rank, device, demand
        self._wanted = [] if steps is None else [steps]
        self._running: _Trace | None = None
        self._looked_seconds = -math.inf

    def is_demanded(self) -> bool:
        """Whether someone asks for a trace, who is then served: the file is removed. Looks once a second at most."""
        if self._demand is None or time.monotonic() - self._looked_seconds < _LOOKING_SECONDS:
            return False
        self._looked_seconds = time.monotonic()
        try:
            self._demand.unlink()
        except OSError:
            return False
        return True

    def demand_after(self, step: int) -> None:
        """Traces the steps that follow. Call it on all ranks."""
        self._wanted.append((step + 1, step + STEPS_ON_DEMAND))

    @contextlib.contextmanager
    def traced(self, step: int) -> Iterator[None]:
        """Surrounds a step, which is traced if it is one of those that are wanted."""
        if self._running is None:
            last = max((last for first, last in self._wanted if first <= step <= last), default=None)
            if last is not None:
                self._running = _Trace(step, last, self._start())
        yield
        if self._running is not None:
            if step == self._running.last_step:
                self.close(step)
            else:
                self._running.profile.step()

    def _start(self) -> profile:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        running = profile(activities=activities, profile_memory=True)
        running.start()
        return running

    def close(self, last_step: int) -> None:
        """Writes what was traced up to a step, if anything was; also of a run that ends earlier than it wanted."""
        if self._running is None:
            return
        trace, self._running = self._running, None
        trace.profile.stop()
        folder = self._folder / f"steps_{trace.first_step}_to_{last_step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trace.profile.export_chrome_trace(str(folder / f"rank{self._rank}_trace.json.gz"))
            if self._device.type == "cuda":
                _write_memory_snapshot(folder / f"rank{self._rank}_memory.pickle")
        except OSError as error:
            print(f"{folder}: {error.strerror}; the run goes on without this trace", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class _Trace:
    first_step: int
    last_step: int
    profile: profile


def _write_memory_snapshot(path: Path) -> None:
    """What lies in the GPUs' memory, and which line allocated it; for https://pytorch.org/memory_viz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]


class OutOfMemory(RunFailure):
    """A GPU has no room for what was asked."""


@contextlib.contextmanager
def memory_watched(folder: Path, rank: int, device: torch.device, *, history: bool) -> Iterator[None]:
    """Writes a snapshot of a GPU's memory, `rank0_out_of_memory.pickle`, when it runs out. Nothing happens on a CPU.

    Args:
        history: remember by which line of Python the last 100,000 allocations were made; about 2 microseconds each.

    Raises:
        OutOfMemory: in place of torch's error, whose text it repeats; it names the snapshot.
    """
    if device.type != "cuda":
        yield
        return
    if history:
        torch.cuda.memory._record_memory_history(max_entries=_MOST_ALLOCATIONS, stacks="python")
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        path = folder / f"rank{rank}_out_of_memory.pickle"
        try:
            _write_memory_snapshot(path)
            told = f"what it holds is in {path}, for https://pytorch.org/memory_viz"
        except OSError as reason:
            told = f"{path}: {reason.strerror}"
        raise OutOfMemory(f"rank {rank}: {error}\n{told}") from error
    finally:
        if history:
            torch.cuda.memory._record_memory_history(None)
