"""All memory of a step by cause, against torch's allocator, under every strategy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_on_ranks
from small_runs import folder_of, overrides_for, write_text
from torch.profiler import ProfilerActivity, profile, record_function

from dist_lowrank.config import RunFolder
from dist_lowrank.telemetry.console import Console
from dist_lowrank.telemetry.metrics import MetricsWriter
from dist_lowrank.training.run import Trainer

AT_PEAK, OF_STEP = "memory_at_peak_bytes/", "memory_bytes/"


class MarkedTrainer(Trainer):
    """Whose steps can be found among the allocator's events."""

    def _step(self, step: int, stop: Any) -> Any:
        with record_function(f"step {step}"):
            return super()._step(step, stop)


def _run(rank: int, folder: RunFolder, steps: tuple[int, ...]) -> dict[int, tuple[int, dict[str, int]]]:
    """By step: the most that torch's CPU allocator had given out since the process began, and what the tracker said."""
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        MetricsWriter(folder.metrics(rank), None) as metrics,
    ):
        MarkedTrainer(folder.config(), folder, torch.device("cpu"), Console(enabled=False), metrics).run([])
    said: dict[int, dict[str, int]] = {}
    for line in folder.metrics(rank).read_text().splitlines():
        entry = json.loads(line)
        said.setdefault(entry["step"], {}).update(entry)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    spans = {e.name(): (e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name().startswith("step ")}
    live, peaks = 0, dict.fromkeys(steps, 0)
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            for step in steps:
                start, stop = spans[f"step {step}"]
                if start <= event.start_ns() <= stop:
                    peaks[step] = max(peaks[step], live)
    return {step: (peaks[step], said[step]) for step in steps}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("optimizer", ["adamw", "dct_adamw"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3"])
def test_x(text: str, tmp_path: Path, strategy: str, optimizer: str) -> None:
    more = [f"strategy={strategy}", f"optimizer={optimizer}", "telemetry.memory_tracker_steps=[1,2]", "train.steps=2"]
    more += ["model.config.hidden_size=48", "model.config.intermediate_size=112"]
    folder = folder_of(overrides_for(text, tmp_path, *more))
    for found in run_on_ranks(2, _run, folder, (1, 2), timeout_seconds=100):
        for step, (allocated, said) in found.items():
            total = said[AT_PEAK + "total"]
            print(
                strategy,
                optimizer,
                step,
                allocated,
                total,
                f"{total / allocated - 1:.3%}",
                "residual",
                said[AT_PEAK + "residual"],
                f"{said[AT_PEAK + 'residual'] / total:.3%}",
            )
            print("   peak", {k.removeprefix(AT_PEAK): v for k, v in said.items() if k.startswith(AT_PEAK) and v})
            print("   most", {k.removeprefix(OF_STEP): v for k, v in said.items() if k.startswith(OF_STEP) and v})
        break
