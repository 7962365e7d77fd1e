"""SIGKILL at any moment: what was committed stays, and the next attempt ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from processes import RankFailure, run_on_ranks
from resumed_runs import assert_same, folders_of, run_each, run_to
from small_runs import overrides_for

from dist_lowrank.checkpoint import committed, folders, newest_good, saver
from dist_lowrank.config import RunFolder

STEPS = 10
RUNS: dict[str, list[str]] = {
    "ddp-feedback": ["strategy=ddp", "optimizer.error_feedback=fp32", "optimizer.refresh_interval=4"],
    "fsdp-trion": ["strategy=fsdp", "optimizer=trion"],
    "zero2-feedback": ["strategy=zero2", "optimizer.error_feedback=fp32", "optimizer.refresh_interval=4"],
    "ddp-trion": ["strategy=ddp", "optimizer=trion"],
    "fsdp-feedback": ["strategy=fsdp", "optimizer.error_feedback=fp32", "optimizer.refresh_interval=4"],
    "zero2-trion": ["strategy=zero2", "optimizer=trion"],
}
# Where a save can be cut off: the function before which the process dies, and at which of its calls.
SAVE_PHASES = {
    "before writing": (saver, "write_shards"),
    "before the manifest": (folders, "write_durably"),
    "before the name": (folders, "commit"),
    "after the name": (folders, "retire"),
}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed(rank: int, folder: RunFolder, victim: int, step: int, phase: str | None) -> Any:
    """A run in which one rank dies: within a step, or in the first save after it."""
    if rank == victim and phase is None:
        from dist_lowrank.training.run import Trainer

        # A little later, so that it dies anywhere in forward, backward or update.
        original, delay_seconds = Trainer._step, random.Random(step).uniform(0, 0.02)

        def dying(self: Any, number: int, stop: list[int]) -> Any:
            if number == step:
                threading.Timer(delay_seconds, _die).start()
            return original(self, number, stop)

        Trainer._step = dying  # type: ignore[method-assign]
    elif rank == victim or phase is not None:
        place, name = SAVE_PHASES[phase or "before writing"]
        original_function, calls = getattr(place, name), []

        def dying_function(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) > step // 3 and rank == (victim if name == "write_shards" else 0):
                _die()
            return original_function(*arguments)

        setattr(place, name, dying_function)
    return run_to(rank, folder)


def _assert_survives(text: str, runs: Path, run: str, victim: int, step: int, phase: str | None) -> None:
    shared = overrides_for(
        text, runs, f"train.steps={STEPS}", "checkpoint.interval_steps=3", *RUNS[run], "checkpoint.keep_last=2"
    )
    (unbroken,) = folders_of([*shared, "checkpoint.interval_steps=null"], runs / "unbroken", 1)
    first, second = folders_of(shared, runs / "broken", 2)
    with pytest.raises(RankFailure, match="exit status 9"):
        run_on_ranks(2, _killed, first, victim, step, phase, timeout_seconds=180)
    assert newest_good(first.checkpoints) == (committed(first.checkpoints) or [None])[-1]
    for continued, whole in run_on_ranks(2, run_each, [(second, None), (unbroken, None)], timeout_seconds=180):
        assert_same(continued["end"], whole["end"])
        for where, loss in continued["losses"].items():
            assert loss == whole["losses"][where], where


@pytest.mark.parametrize(
    ("run", "victim", "step", "phase"),
    [
        ("ddp-feedback", 1, 6, None),
        ("fsdp-trion", 0, 6, "before the name"),
        ("zero2-feedback", 1, 3, "before writing"),
    ],
)
def test_a_killed_run_ends_as_an_undisturbed_one(
    text: str, tmp_path: Path, run: str, victim: int, step: int, phase: str | None
) -> None:
    _assert_survives(text, tmp_path, run, victim, step, phase)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_twenty_random_kills(text: str, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    phase = draw.choice([None, None, *SAVE_PHASES])
    run = draw.choice(list(RUNS))
    _assert_survives(text, tmp_path, run, draw.randrange(2), draw.randrange(1, STEPS) if phase is None else 3, phase)
