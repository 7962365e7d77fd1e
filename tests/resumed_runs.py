"""Runs that are stopped, continued elsewhere, and compared with runs that were not."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed_runs import set_environment
from safetensors.torch import load_file
from small_runs import folder_of
from torch import Tensor

from dist_lowrank.checkpoint.folders import committed
from dist_lowrank.checkpoint.random_state import random_state
from dist_lowrank.checkpoint.shards import own_parts
from dist_lowrank.config import RunFolder
from dist_lowrank.telemetry.console import Console
from dist_lowrank.telemetry.metrics import MetricsWriter
from dist_lowrank.training.run import Trainer
from dist_lowrank.training.stop import StopReason

Whole = dict[str, Tensor]


def trainer_of(folder: RunFolder, metrics: MetricsWriter) -> Trainer:
    set_environment()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return Trainer(folder.config(), folder, torch.device("cpu"), Console(enabled=False), metrics)


def whole_state(trainer: Trainer) -> Whole:
    """Everything that a checkpoint has, put together from all ranks; the same on each."""
    parts = own_parts(trainer.checkpoints.state.to_save())
    plain = {name: (part.tensor.clone(), part.shape, part.offset) for name, part in parts.items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, plain)
    whole: Whole = {}
    for found in gathered:
        for name, (tensor, shape, offset) in found.items():
            target = whole.setdefault(name, torch.full(shape, 77).to(tensor.dtype))
            target[tuple(slice(o, o + s) for o, s in zip(offset, tensor.shape, strict=True))] = tensor
    whole["learning_rates"] = torch.tensor([group["lr"] for group in trainer.optimizer.param_groups])
    state = random_state(torch.device("cpu"))
    return whole | {f"random.{dist.get_rank()}.{name}": tensor for name, tensor in state.items()}


def run_to(rank: int, folder: RunFolder, stop_after: int | None = None) -> dict[str, Any]:
    """Starts or continues an attempt. `stop_after`: a signal arrives during this step.

    Returns:
        What a checkpoint has at the beginning and at the end, and the losses of every step.
    """
    with MetricsWriter(folder.metrics(rank), None) as metrics:
        trainer = trainer_of(folder, metrics)
        begin: Whole = {}
        resume, step = trainer.checkpoints.resume, trainer._step
        stop: list[StopReason] = []

        def resume_and_look() -> int:
            done = resume()
            begin.update(whole_state(trainer))
            return done

        def step_and_look(number: int, received: list[StopReason]) -> Any:
            if number == stop_after:
                stop.append(StopReason.TERMINATE)
            torch.rand(3)  # as dropout would
            return step(number, received)

        trainer.checkpoints.resume = resume_and_look  # type: ignore[method-assign]
        trainer._step = step_and_look  # type: ignore[method-assign]
        trainer.run(stop)
        end = whole_state(trainer)
    entries = [json.loads(line) for line in folder.metrics(rank).read_text().splitlines()]
    losses = {
        (entry["step"], tag): entry[tag]
        for entry in entries
        for tag in ("loss/train", "loss/validation")
        if tag in entry
    }
    return {"begin": begin, "end": end, "losses": losses, "skipped": trainer.progress.skipped_steps}


def run_each(rank: int, attempts: Sequence[tuple[RunFolder, int | None]]) -> list[Any]:
    """One after the other in the same processes: a folder, and where it is stopped."""
    return [run_to(rank, folder, stop_after) for folder, stop_after in attempts]


def folders_of(overrides: Sequence[str], runs: Path, count: int) -> list[RunFolder]:
    """Attempts of one run."""
    return [folder_of([*overrides, f"runs={runs}"]) for _ in range(count)]


def assert_same(found: Whole, expected: Whole) -> None:
    """To the bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        same = found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
        assert same, f"{name} differs"


def assert_same_end(run: Path, expected: Path) -> None:
    """Of the newest checkpoints of two runs, of as many ranks: the same step, and everything in them to the bit."""
    found, wanted = (committed(path / "checkpoints")[-1] for path in (run, expected))
    assert found.name.partition("-step-")[2] == wanted.name.partition("-step-")[2]
    names = sorted(path.name for path in wanted.glob("*.safetensors"))
    assert sorted(path.name for path in found.glob("*.safetensors")) == names
    for name in names:
        assert_same(load_file(found / name), load_file(wanted / name))


def without_random(whole: Whole) -> Whole:
    """What does not depend on the number of ranks."""
    return {name: tensor for name, tensor in whole.items() if not name.startswith("random.")}
