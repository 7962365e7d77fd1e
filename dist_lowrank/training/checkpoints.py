"""Checkpoints of a run: when one is due, what belongs in it, and where a run continues."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.optim.lr_scheduler import LambdaLR

from dist_lowrank.checkpoint import CheckpointError, Saver, Sidecar, committed, open_checkpoint
from dist_lowrank.checkpoint.errors import together
from dist_lowrank.checkpoint.folders import checkpoints_at
from dist_lowrank.checkpoint.manifest import FORMAT, Checkpoint
from dist_lowrank.checkpoint.random_state import random_state
from dist_lowrank.checkpoint.restore import check_can_follow, load
from dist_lowrank.checkpoint.saver import Saved
from dist_lowrank.checkpoint.shards import Shard
from dist_lowrank.checkpoint.state import TrainingState
from dist_lowrank.config import ConfigError, RunConfig, RunFolder, digest, to_dict
from dist_lowrank.config.run_folder import versions
from dist_lowrank.exit_codes import RunFailure
from dist_lowrank.telemetry.console import Console, quantity
from dist_lowrank.training.data.batches import Batches

LOCK = ".lock"  # in the run's folder
_PATIENCE_SECONDS = 15.0  # with the ranks of an attempt that is just ending
_claimed: dict[Path, FileLock] = {}  # held until this process ends, however it does


@dataclass
class Progress:
    """What a run remembers beside its tensors."""

    skipped_steps: int = 0
    first_validation_loss: float = math.nan
    validation_loss: float = math.nan


@dataclass
class Checkpoints:
    """Saves a run and continues it. `save`, `close` and `resume` are collective."""

    config: RunConfig
    folder: RunFolder
    state: TrainingState
    schedule: LambdaLR
    data: Batches
    device: torch.device
    console: Console
    progress: Progress

    def __post_init__(self) -> None:
        settings = self.config.checkpoint
        self.saver = Saver(
            self.folder.checkpoints,
            asynchronous=settings.asynchronous,
            keep_last=settings.keep_last,
            keep_every_steps=settings.keep_every_steps,
            report=self._report,
        )
        self._versions = versions()
        self._last_seconds = time.monotonic()
        self._saved_step = 0
        self._problem: str | None = None  # why the last save failed, as all ranks know

    # When ---------------------------------------------------------------------------------------------------------

    @property
    def due_by_clock(self) -> bool:
        """Whether this rank's clock says so; ranks have to agree before they save."""
        minutes = self.config.checkpoint.interval_minutes
        return minutes is not None and time.monotonic() - self._last_seconds >= 60 * minutes

    def is_due(self, step: int, *, by_clock: bool, last: bool) -> bool:
        """Whether to save after this step.

        Args:
            by_clock: whether the clock of any rank says so; the same on all ranks.
            last: of the run, or before it stops.
        """
        settings = self.config.checkpoint
        self.saver.poll()
        by_steps = settings.interval_steps is not None and step % settings.interval_steps == 0
        return by_steps or by_clock or (last and settings.at_end)

    def save(self, step: int, *, wait: bool = False) -> None:
        """Saves the state after a step, if that is not done or under way. Returns before it is on the disk.

        Args:
            wait: return when it is.
        """
        if step != self._saved_step:
            began = time.monotonic()
            self._wait()
            self._last_seconds = time.monotonic()
            shards = self.state.to_save()
            if not all(together(self.saver.group, lambda: all_finite(shards))):
                self._problem = f"step {step}: no checkpoint was saved: weights or optimizer state are not finite"
                self.console.line(self._problem)
                return
            self._saved_step = step
            positions = together(self.saver.group, self.data.state_dict)
            sidecar = self._sidecar(step, positions)
            self.saver.save(shards, random_state(self.device), sidecar, began=began)
            self._last_seconds = time.monotonic()
        if wait:
            self._wait()

    def is_saved(self, step: int) -> bool:
        """Whether the state after this step is in a checkpoint; call it after `close`."""
        return self._saved_step == step and self._problem is None

    def check_saved(self, step: int) -> None:
        """Ends a run whose last state is in no checkpoint, so that it does not pass for finished; after `close`."""
        if not self.is_saved(step):
            raise RunFailure(f"{self._problem}; so the run is not finished")

    def close(self) -> None:
        """Waits until what is being saved is saved."""
        self._wait()

    def _wait(self) -> None:
        self.saver.wait()
        if self._problem is not None and self.config.checkpoint.stop_on_failure:
            raise CheckpointError(self._problem)

    def _sidecar(self, step: int, positions: list[dict[str, Any]]) -> Sidecar:
        progress = {name: _finite(value) for name, value in vars(self.progress).items()}
        rates = [float(group["lr"]) for group in self.schedule.optimizer.param_groups]
        return Sidecar(
            format=FORMAT,
            step=step,
            world_size=dist.get_world_size(),
            data=positions,
            schedule={"step": self.schedule.last_epoch, "learning_rates": rates},
            progress=progress,
            config=to_dict(self.config),
            digest=digest(self.config),
            versions=self._versions,
        )

    def _report(self, saved: Saved) -> None:
        if saved.problem is None:
            self._problem = None
            self.console.line(
                f"step {saved.step}: checkpoint {saved.path}, {quantity(saved.stored_bytes)}B per rank in "
                f"{saved.seconds:.2f} s, of which training waited {saved.blocked_seconds:.2f} s"
            )
            return
        self._problem = f"step {saved.step}: no checkpoint was saved: {saved.problem}"
        self.console.line(self._problem)

    # Where a run continues ----------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Continues where the configuration says. Returns the step that was reached; 0: a run from the beginning.

        Raises:
            CheckpointError: no checkpoint is as it was saved; nothing was loaded.
            ConfigError: the checkpoint cannot be followed by this configuration, or other processes train in the run's
                folder; nothing was loaded.
        """
        settings = self.config.resume
        if not all(together(self.saver.group, lambda: dist.get_rank() != 0 or _claim(self.folder.path))):
            raise ConfigError(
                f"resume: {settings.source} is not allowed while other processes train in {self.folder.path}; allowed: "
                "when they have ended, or resume=none, a fresh run in a folder of its own"
            )
        places = self._places()
        problems: list[str] = []
        for number, (place, weights_only) in enumerate(places):
            try:
                return self._continue(place, weights_only)
            except CheckpointError as error:
                problems.append(str(error))
                if not settings.fallback or number == len(places) - 1:
                    raise CheckpointError("\n".join(problems) + self._advice(number, places)) from error
                self.console.line(f"not continued from {place.name}: {error}")
        return 0

    def _advice(self, tried: int, places: list[tuple[Path, bool]]) -> str:
        if tried == len(places) - 1:
            return ""
        return f"\nThe one before it is {places[tried + 1][0]}; resume.fallback=true goes back to the newest good one"

    def _places(self) -> list[tuple[Path, bool]]:
        """Checkpoints to try, best first, and whether only the weights are wanted; rank 0 looks, for all."""
        found = together(self.saver.group, lambda: self._look() if dist.get_rank() == 0 else [])
        return found[0]

    def _look(self) -> list[tuple[Path, bool]]:
        own = [(path, False) for path in reversed(committed(self.folder.checkpoints))]
        settings = self.config.resume
        if own or not settings.starts_elsewhere:
            return own
        return [(path, settings.weights_only) for path in checkpoints_at(Path(settings.source))]

    def _continue(self, path: Path, weights_only: bool) -> int:
        checkpoint = together(self.saver.group, lambda: open_checkpoint(path))[0]
        if not weights_only:
            check_can_follow(checkpoint, self.config)
        exact = load(checkpoint, self.state, self.device, self.saver.group, weights_only=weights_only)
        if weights_only:
            self.console.line(f"weights from {path}")
            return 0
        sidecar = checkpoint.sidecar
        self.console.line(f"continuing from {path}, after step {sidecar.step}")
        if not exact:
            self.console.line("random state: not of this device or version; it starts anew")
        self._set_schedule(sidecar.step)
        self._set_data(checkpoint)
        self._set_progress(sidecar.progress)
        self._saved_step = sidecar.step
        return sidecar.step

    def _set_schedule(self, step: int) -> None:
        """The configured schedule at this step, which may be another than the one that was saved under."""
        schedule = self.schedule
        schedule.last_epoch = step
        for group, base, factor in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(step)
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]

    def _set_data(self, checkpoint: Checkpoint) -> None:
        saved, wanted = checkpoint.sidecar.config, to_dict(self.config)
        there = saved["data"] if isinstance(saved.get("data"), dict) else {}
        keys = [key for key in wanted["data"] if key not in ("cache", "workers")]  # which change nothing
        differing = [f"data.{key}" for key in keys if there.get(key) != wanted["data"][key]]
        differing += ["seed"] if saved.get("seed") != wanted["seed"] else []
        if differing:
            self.console.line(f"data: read from the beginning, because {', '.join(differing)} changed")
            return
        positions = checkpoint.sidecar.data
        own = positions[min(dist.get_rank(), len(positions) - 1)]
        try:
            together(self.saver.group, lambda: self.data.load_state_dict(own))
        except CheckpointError as error:  # a stream on another number of ranks
            raise ConfigError(
                f"{checkpoint.path}: {error}; allowed: as many ranks, or resume.weights_only=true"
            ) from error

    def _set_progress(self, saved: Mapping[str, Any]) -> None:
        for name in vars(self.progress):
            value = saved.get(name)
            if isinstance(value, int | float):
                setattr(self.progress, name, value)


def _claim(run: Path) -> bool:
    """Whether this process is the only one that trains in a run's folder; from then on, until it ends."""
    if run in _claimed:
        return True
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=_PATIENCE_SECONDS)
    except Timeout:
        return False
    except (OSError, NotImplementedError):  # a file system without locks, or without room
        return True
    _claimed[run] = lock
    return True


def all_finite(shards: Mapping[str, Shard]) -> bool:
    """Whether what this rank holds may be continued from."""
    tensors = [shard.tensor for shard in shards.values() if shard.tensor.is_floating_point()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
