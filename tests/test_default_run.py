"""The main job: what `make train` starts learns, repeats itself, and always ends with exit code 0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from math import log
from pathlib import Path

import pytest
from processes import run_on_ranks
from small_runs import assert_events_equal_lines, folder_of, losses, overrides_for, run_loop

from dist_lowrank.config import RunFolder, compose, open_run
from dist_lowrank.training.data import load_data

COMMAND = str(Path(sys.executable).with_name("dist-lowrank"))


def test_the_same_configuration_gives_the_same_losses_to_the_bit(text: str, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        folder = folder_of(overrides_for(text, tmp_path, "train.steps=5"))
        found.append(losses(run_on_ranks(2, run_loop, folder)[0]))
    assert len(found[0]) == 5
    assert found[0] == found[1]


def _whole_worker(rank: int, folder: RunFolder, world_size: int) -> None:
    """Everything that a started worker does, its way out included: does not return."""
    import torch.distributed as dist

    from dist_lowrank import worker

    store = dist.FileStore(str(folder.attempt_path / "store"), world_size)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    worker._work(folder.config(), folder, store, speaks=True)


def _end_of_worker(folder: RunFolder, rank: int) -> int:
    pid = os.fork()
    if pid == 0:
        _whole_worker(rank, folder, 2)
    return pid


def test_ten_runs_end_with_exit_code_0(text: str, tmp_path: Path) -> None:
    for _ in range(10):
        # One thread: the OpenMP threads of this process do not survive the fork.
        folder = folder_of(
            overrides_for(text, tmp_path, "train.steps=1", "train.eval_sequences=2", "launcher.threads=1")
        )
        children = [_end_of_worker(folder, rank) for rank in range(2)]
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
        assert folder.is_finished


def _train(runs: Path, *overrides: str) -> RunFolder:
    subprocess.run([COMMAND, "train", f"runs={runs}", *overrides], check=True, timeout=600)
    (path,) = (each for each in runs.iterdir() if (each / "FINISHED").exists())
    return open_run(path)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_hundred_commands_end_with_exit_code_0(text: str, tmp_path: Path) -> None:
    for number in range(100):
        overrides = overrides_for(text, tmp_path, "train.steps=1", "train.eval_sequences=2", f"seed={number}")
        subprocess.run([COMMAND, "train", *overrides], check=True, timeout=120, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_default_run_learns_in_four_minutes_and_repeats_itself(tmp_path: Path) -> None:
    started_seconds = time.monotonic()
    first = _train(tmp_path / "first")
    assert time.monotonic() - started_seconds < 240  # on two cores
    summary = json.loads((first.path / "FINISHED").read_text())
    assert summary["validation_loss"] <= summary["first_validation_loss"] - 2.5
    assert summary["validation_loss"] <= unigram_loss() - 0.7
    assert summary["unigram_loss"] == pytest.approx(unigram_loss(), abs=1e-3)
    for rank in range(2):
        assert_events_equal_lines(first, rank)

    second = _train(tmp_path / "second")
    assert loss_lines(first) == loss_lines(second)


def loss_lines(folder: RunFolder) -> list[tuple[int, str, float]]:
    entries = [json.loads(line) for line in folder.metrics(0).read_text().splitlines()]
    return [(e["step"], tag, e[tag]) for e in entries for tag in ("loss/train", "loss/validation") if tag in e]


def unigram_loss() -> float:
    """Nats per held-out target of an add-one-smoothed unigram model of the default data."""
    config = compose().data
    data = load_data(config, seed=0, rank=0, world_size=1, global_batch_size=100, micro_batch_size=100)
    counts: Counter[int] = Counter()
    while data.train.epoch < 1:
        for batch in data.train.next_batch():
            counts.update(batch.flatten().tolist())
    total = sum(counts.values()) + len(data.tokenizer)
    targets = [token for i in range(len(data.validation)) for token in data.validation[i][1:].tolist()]
    return -sum(log((counts[token] + 1) / total) for token in targets) / len(targets)
