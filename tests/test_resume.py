"""A run that was stopped and continued is, to the bit, the run that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from processes import run_on_ranks
from resumed_runs import assert_same, folders_of, run_each
from small_runs import overrides_for

STAGGER = "optimizer.refresh_stagger=true"
CASES: dict[str, list[str]] = {
    # Stopped in the middle of a refresh interval.
    "ddp-feedback": ["strategy=ddp", "optimizer.error_feedback=fp32", "optimizer.refresh_interval=4"],
    "fsdp-trion": ["strategy=fsdp", "optimizer=trion", "checkpoint.asynchronous=false"],
    "zero2-feedback": ["strategy=zero2", "optimizer.error_feedback=fp32", "optimizer.refresh_interval=4"],
    "fsdp-low-bit": ["strategy=fsdp", "optimizer.error_feedback=int4", "optimizer.moment_dtype=int8"],
}
BROAD: dict[str, list[str]] = {
    **{f"{s}-adamw": [f"strategy={s}", "optimizer=adamw"] for s in ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")},
    **{f"{s}-trion": [f"strategy={s}", "optimizer=trion"] for s in ("ddp", "zero0", "zero1", "zero2", "zero3")},
    **{
        f"{s}-bf16": [f"strategy={s}", "precision=bf16", "optimizer.error_feedback=int8"]
        for s in ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
    },
    **{
        f"fsdp-{o}": ["strategy=fsdp", f"optimizer={o}", "optimizer.refresh_interval=4"]
        for o in ("galore", "fira", "frugal", "ldadam", "apollo", "golore")
    },
    **{
        f"{s}-shared": [f"strategy={s}", "optimizer.dictionary=shared", "optimizer.dictionary_interval=4"]
        for s in ("ddp", "fsdp", "zero2", "zero3")
    },
    **{
        f"{s}-{o}": [f"strategy={s}", f"optimizer={o}"]
        for s in ("fsdp", "zero2")
        for o in ("adafactor", "adamw8bit", "came", "scale", "smmf", "subtrack", "grass")
    },
    **{
        f"{s}-blocks": [f"strategy={s}", "optimizer=frugal_published", "optimizer.refresh_interval=4"]
        for s in ("ddp", "fsdp", "zero0", "zero2", "zero3")
    },
    "fsdp-staggered": ["strategy=fsdp", "optimizer=galore", "optimizer.refresh_interval=4", STAGGER],
    "fsdp-bf16-weights": ["strategy=fsdp", "precision=bf16_weights", "optimizer.weight_rounding=stochastic"],
}


def _assert_resumes(text: str, runs: Path, more: list[str], steps: int = 9, stop_after: int = 6) -> None:
    shared = overrides_for(text, runs, f"train.steps={steps}", "train.eval_interval=4", *more)
    (unbroken,) = folders_of(shared, runs / "unbroken", 1)
    first, second = folders_of(shared, runs / "broken", 2)
    attempts = [(unbroken, None), (first, stop_after), (second, None)]
    results: list[Any] = run_on_ranks(2, run_each, attempts, timeout_seconds=120)
    for whole, stopped, continued in results:
        assert_same(continued["begin"], stopped["end"])
        assert_same(continued["end"], whole["end"])
        assert {step for step, _ in continued["losses"]} == set(range(stop_after + 1, steps + 1))
        for where, loss in continued["losses"].items():
            assert loss == whole["losses"][where], where


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_continues_to_the_bit(text: str, tmp_path: Path, case: str) -> None:
    _assert_resumes(text, tmp_path, CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", BROAD)
def test_every_strategy_and_optimizer_continues_to_the_bit(text: str, tmp_path: Path, case: str) -> None:
    _assert_resumes(text, tmp_path, BROAD[case])
