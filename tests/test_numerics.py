"""What a run makes of numbers that go wrong."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from small_runs import folder_of, overrides_for
from worker_processes import output, start_workers, wait_for

from dist_lowrank.exit_codes import ExitCode, NotFinite
from dist_lowrank.training import run
from dist_lowrank.training.numerics import LossSpikes, SkippedInARow, check_not_mostly_skipped


def test_a_spike_is_told_from_noise_and_from_learning() -> None:
    noise = random.Random(0)
    spikes = LossSpikes()
    falling = [8 * math.exp(-step / 200) + 2 + noise.gauss(0, 0.05) for step in range(400)]
    falling[300] += 1.0
    falling[350] = math.nan
    found = {step: median for step, loss in enumerate(falling) if (median := spikes.median_if_spike(loss)) is not None}
    assert found.keys() == {300}
    assert found[300] == pytest.approx(falling[299], abs=0.4)


def test_losses_that_repeat_exactly_are_no_spikes() -> None:
    spikes = LossSpikes()
    assert all(spikes.median_if_spike(2.0 + 1e-6 * (step % 2)) is None for step in range(200))


def test_only_skips_in_a_row_end_a_run() -> None:
    skipped = SkippedInARow(3)
    for step, bad in enumerate([True, True, False, True, True]):
        skipped.note(step, bad)
    with pytest.raises(NotFinite, match=r"step 5: .* 3 times in a row \(train.max_skipped_steps: 3\)"):
        skipped.note(5, True)
    check_not_mostly_skipped(2, 4)
    with pytest.raises(NotFinite, match="3 of 4 updates"):
        check_not_mostly_skipped(3, 4)


def _spoil_three_of_five(rank: int) -> None:
    next_token_loss, losses = run.next_token_loss, iter([0.0, math.nan, math.nan, 0.0, math.nan])

    def spoiled(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        loss = next_token_loss(model, batch)
        return loss + next(losses) if torch.is_grad_enabled() else loss

    run.next_token_loss = spoiled  # type: ignore[assignment]


def test_a_run_that_skipped_most_of_its_steps_is_no_success(text: str, tmp_path: Path) -> None:
    settings = ("train.steps=5", "train.eval_sequences=2", "train.global_batch_size=4", "launcher.threads=1")
    folder = folder_of(overrides_for(text, tmp_path, *settings))
    assert wait_for(start_workers(folder, _spoil_three_of_five)) == [ExitCode.NOT_FINITE] * 2, output(folder)
    assert "3 of 5 updates were skipped" in output(folder)
    assert f"newest good checkpoint {folder.checkpoints}/save-0001-step-00000005" in output(folder)
    assert not folder.is_finished
