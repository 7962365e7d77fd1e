"""Faults that strike one rank in a phase, armed in the forked rank itself; the package knows nothing of them."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from dist_lowrank.checkpoint.folders import committed
from dist_lowrank.config import RunFolder
from dist_lowrank.optim import columns, wave
from dist_lowrank.training import run
from dist_lowrank.training.position import Position

PLACES = ("forward", "backward", "step", "refresh", "save")
AT_STEP = 6
STRUCK = "struck.json"  # in the run's folder: the checkpoints that were committed when the fault struck


@dataclass
class Fault:
    """One fault, which strikes once. `folder` is where the disk is filled and checkpoints are damaged."""

    kind: str
    place: str
    folder: RunFolder
    struck: bool = False
    step: int = 0
    trainer: Any = None

    def arm(self) -> None:
        """Puts itself in the way of this process."""
        _before(Position, "enter", self._entering)
        _before(wave, "_turns_of_update", lambda jobs, *_: self.strike_in("step", _gradients(jobs)))
        _before(columns, "column_scores", lambda coordinates, *_: self.strike_in("refresh", [coordinates]))
        _before(HuggingFaceStorageWriter, "write_data", self._writing)
        _before(run.Trainer, "_save", self._keep_trainer)
        next_token_loss = run.next_token_loss

        def poisoned_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
            loss = next_token_loss(model, batch)
            if self.kind == "NaN gradient" and self._is_due("forward"):
                return loss * math.nan
            return _Poison.apply(loss) if self.kind == "NaN gradient" and self._is_due("backward") else loss

        run.next_token_loss = poisoned_loss  # type: ignore[assignment]

    def _entering(self, _: Position, phase: str, step: int | None = None) -> None:
        self.step = self.step if step is None else step
        if self.kind == "NaN gradient" and phase == "save" and self._is_due("save"):
            _poison([_local(parameter) for parameter in self.trainer.strategy.model.parameters()])
        elif phase in ("forward", "backward") and self.kind != "NaN gradient":
            self.strike_in(phase, None)

    def _writing(self, writer: Any, *_: Any) -> None:
        if str(writer.path).endswith(f"-step-{AT_STEP:08d}"):  # not what is still being saved of before
            self.strike_in("save", None)

    def _keep_trainer(self, trainer: Any, *_: Any) -> None:
        self.trainer = trainer

    def _is_due(self, place: str) -> bool:
        if self.struck or place != self.place or self.step < AT_STEP:
            return False
        if place != "save" and not torch.is_grad_enabled():
            return False  # an evaluation
        self.struck = True
        return True

    def strike_in(self, place: str, gradients: list[torch.Tensor] | None) -> None:
        if self.struck or place != self.place or self.step < AT_STEP:
            return
        if self.kind == "NaN gradient":
            if gradients is None:
                return
            _poison(gradients)
        self.struck = True
        kept = [path.name for path in committed(self.folder.checkpoints)]
        (self.folder.path / STRUCK).write_text(json.dumps(kept))
        ACTIONS[self.kind](self.folder)


def _raise(folder: RunFolder) -> None:
    raise RuntimeError("a fault of the test")


def _signal(number: int) -> Callable[[RunFolder], None]:
    return lambda folder: os.kill(os.getpid(), number)


def _damage_newest_and_die(folder: RunFolder) -> None:
    damage(committed(folder.checkpoints)[-1])
    os.kill(os.getpid(), signal.SIGKILL)


def damage(checkpoint: Path) -> Path:
    """Flips a bit in the middle of the largest file; returns the file."""
    path = max(checkpoint.glob("*.safetensors"), key=lambda each: each.stat().st_size)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    return path


def _fill_disk(folder: RunFolder) -> None:
    block = 1 << 20
    with open(folder.path.parent / "filler", "wb", buffering=0) as file:
        while block:
            try:
                file.write(b"\0" * block)
            except OSError:
                block //= 2


ACTIONS: dict[str, Callable[[RunFolder], None]] = {
    "exception": _raise,
    "SIGTERM": _signal(signal.SIGTERM),
    "SIGKILL": _signal(signal.SIGKILL),
    "SIGSTOP": _signal(signal.SIGSTOP),
    "NaN gradient": lambda folder: None,
    "corrupted shard": _damage_newest_and_die,
    "full disk": _fill_disk,
    "slow rank": lambda folder: time.sleep(1),
    "wrong configuration": _signal(signal.SIGKILL),  # and comes back with it
}


class _Poison(torch.autograd.Function):
    """A value that is fine, with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan


def _before(owner: Any, name: str, action: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def both(*args: Any, **named: Any) -> Any:
        action(*args, **named)
        return original(*args, **named)

    setattr(owner, name, both)


def _gradients(wave: Any) -> list[torch.Tensor]:
    return [_local(matrix.parameter.grad) for matrix, _ in wave if matrix.parameter.grad is not None]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _poison(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        if tensor.numel():
            tensor.view(-1)[0] = math.nan
