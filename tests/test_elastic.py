"""A run that moves between strategies and numbers of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_on_ranks
from resumed_runs import assert_same, folders_of, run_to, without_random
from small_runs import overrides_for

Hop = tuple[str, int]  # strategy and processes
FURTHER_STEPS = 20
CHAINS: dict[str, tuple[str, list[Hop]]] = {
    "fp32": ("precision=fp32", [("fsdp", 4), ("zero2", 2), ("ddp", 1), ("fsdp", 4)]),
    "fp64": ("precision=fp64", [("fsdp", 4), ("hsdp", 2), ("ddp", 1), ("fsdp", 4)]),
}
BROAD: dict[str, tuple[str, list[Hop]]] = {
    "stages": ("precision=fp32", [("zero3", 4), ("zero1", 2), ("zero0", 2), ("zero3", 3), ("fsdp", 2)]),
    "bf16": ("precision=bf16", [("zero3", 4), ("fsdp", 2), ("zero1", 3), ("zero0", 2), ("ddp", 2), ("zero2", 4)]),
    "fp64-down": ("precision=fp64", [("ddp", 4), ("fsdp", 3), ("hsdp", 4), ("fsdp", 1), ("ddp", 2)]),
}
OPTIMIZERS: dict[str, list[str]] = {
    "plain": ["optimizer.refresh_interval=5"],
    "feedback": ["optimizer.error_feedback=fp32", "optimizer.refresh_interval=5"],
    "trion": ["optimizer=trion"],
    "adamw": ["optimizer=adamw"],
    "shared": ["optimizer.dictionary=shared", "optimizer.dictionary_interval=4"],
    "low-bit": ["optimizer.error_feedback=int4", "optimizer.moment_dtype=int8"],
}


def _assert_follows(text: str, runs: Path, precision: str, hops: list[Hop], more: list[str]) -> None:
    steps = 3 * (len(hops) - 1) + FURTHER_STEPS
    shared = overrides_for(text, runs, f"train.steps={steps}", precision, "train.global_batch_size=12", *more)
    (folder,) = folders_of([*shared, "strategy=ddp"], runs / "unbroken", 1)
    expected = run_on_ranks(1, run_to, folder)[0]
    exactness = {"fp64": 1e-8, "fp32": 1e-3, "bf16": 1e-2}[precision.removeprefix("precision=")]
    state = None
    for number, (strategy, processes) in enumerate(hops):
        (folder,) = folders_of([*shared, f"strategy={strategy}"], runs / "moving", 1)
        stop_after = 3 * (number + 1) if number < len(hops) - 1 else None
        found = run_on_ranks(processes, run_to, folder, stop_after, timeout_seconds=120)[0]
        if state is not None:
            assert_same(without_random(found["begin"]), state)
        state = without_random(found["end"])
        for where, loss in found["losses"].items():
            if where[1] == "loss/validation" and where not in expected["losses"]:
                continue  # of the step it was stopped after
            assert loss == pytest.approx(expected["losses"][where], abs=exactness), where
    assert state is not None
    if precision == "precision=fp64":
        for name, tensor in without_random(expected["end"]).items():
            if tensor.dtype.is_floating_point:
                difference = float((state[name] - tensor).abs().max())
                assert difference <= exactness, f"{name} differs by {difference}"
            else:
                assert torch.equal(state[name], tensor), name


def test_a_run_moves_between_strategies_and_process_counts(text: str, tmp_path: Path) -> None:
    _assert_follows(text, tmp_path, *CHAINS["fp32"], OPTIMIZERS["feedback"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("chain", [*CHAINS, *BROAD])
def test_every_optimizer_moves_between_strategies(text: str, tmp_path: Path, chain: str, optimizer: str) -> None:
    if optimizer == "low-bit" and "fp32" not in chain:
        pytest.skip("codes are rounded at random by rows, and their step to the next depends on sums")
    _assert_follows(text, tmp_path, *(CHAINS | BROAD)[chain], OPTIMIZERS[optimizer])
