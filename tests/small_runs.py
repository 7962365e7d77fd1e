"""Training runs that take a second or two: a tiny model on a little text, in forked processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama  # noqa: F401 (imported before the fork, so that the ranks need not)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_lowrank.config import RunFolder, compose, create
from dist_lowrank.telemetry.console import Console
from dist_lowrank.telemetry.metrics import MetricsWriter
from dist_lowrank.training.run import Trainer

# Big enough that every strategy shards something unevenly (three heads of 4, an odd intermediate size to the left).
TINY = [
    "model.config.vocab_size=320",
    "model.config.hidden_size=12",
    "model.config.intermediate_size=28",
    "model.config.num_attention_heads=3",
    "model.config.num_hidden_layers=2",
    "data.vocab_size=320",
    "data.sequence_length=16",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.eval_interval=100",
    "train.eval_sequences=10",
    "train.export=false",
    "telemetry.tensorboard=false",
]


def write_text(folder: Path) -> str:
    """A few files of simple English; returns the folder."""
    for number in range(8):
        sentences = [f"The {w} of number {number * i} stood by the {v}." for i, (w, v) in enumerate(WORDS * 30)]
        (folder / f"{number}.txt").write_text(" ".join(sentences))
    return str(folder)


WORDS = [("senate", "river"), ("captain", "harbour"), ("treaty", "mountain"), ("people", "constitution")]


def overrides_for(text: str, runs: Path, *more: str) -> list[str]:
    data = ["data=text", f"data.path={text}", f"data.cache={runs}/cache", "data.validation_fraction=0.2"]
    return [*data, *TINY, f"runs={runs}", *more]


def folder_of(overrides: list[str]) -> RunFolder:
    return create(compose(overrides), overrides)


def full_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.strategy.whole_weights()


def run_loop(rank: int, folder: RunFolder) -> dict[str, Any]:
    """The whole loop; returns losses and final weights."""
    with MetricsWriter(folder.metrics(rank), None) as metrics:
        trainer = Trainer(folder.config(), folder, torch.device("cpu"), Console(enabled=False), metrics)
        trainer.run([])
        weights = full_weights(trainer)
    entries = [json.loads(line) for line in folder.metrics(rank).read_text().splitlines()]
    return {
        "entries": entries,
        "weights": weights if dist.get_rank() == 0 else None,
        "skipped": trainer.progress.skipped_steps,
    }


def losses(result: dict[str, Any]) -> list[float]:
    return [entry["loss/train"] for entry in result["entries"] if "loss/train" in entry]


def assert_events_equal_lines(folder: RunFolder, rank: int) -> None:
    """All scalars of a rank; its memory lies twice in the events, once under tags that name the rank."""
    events = EventAccumulator(str(folder.tensorboard(rank)), size_guidance={"scalars": 0}).Reload()
    from_events = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    from_lines = {}
    for line in folder.metrics(rank).read_text().splitlines():
        entry = json.loads(line)
        from_lines |= {(tag, entry["step"]): v for tag, v in entry.items() if tag not in ("step", "time")}
    again = {(tag, step): v for (tag, step), v in from_events.items() if tag.startswith("memory_of_rank/")}
    for (tag, step), value in again.items():
        assert value == from_events[tag.replace(f"memory_of_rank/{rank:05d}", "memory_bytes"), step]
    assert from_events.keys() - again.keys() == from_lines.keys()
    for key, value in from_lines.items():
        assert from_events[key] == pytest.approx(value, rel=1e-6), key
