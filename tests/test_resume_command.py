"""Which folder and which checkpoint a command means."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from processes import run_on_ranks
from resumed_runs import run_each, run_to
from small_runs import folder_of, overrides_for

from dist_lowrank.config import ConfigError, RunFolder, compose, open_run
from dist_lowrank.exit_codes import RunFailure
from dist_lowrank.launchers.preparation import prepare_resume, prepare_run
from dist_lowrank.telemetry.console import Console
from dist_lowrank.telemetry.metrics import MetricsWriter
from dist_lowrank.training import checkpoints
from dist_lowrank.training.run import Trainer

COMMAND = str(Path(sys.executable).with_name("dist-lowrank"))


def test_a_run_resumes_in_its_folder_with_what_its_last_attempt_was_told(text: str, tmp_path: Path) -> None:
    told = overrides_for(text, tmp_path, "train.steps=5", "strategy=ddp", "optimizer.lr=0.004", "launcher.device=cpu")
    folder = folder_of(told)
    config, attempt = prepare_resume(str(folder.path), ["strategy=fsdp", "telemetry.log_interval=2"])
    assert (attempt.path, attempt.attempt) == (folder.path, 2)
    assert (config.strategy.name, config.telemetry.log_interval, config.optimizer.lr) == ("fsdp", 2, 0.004)
    again, attempt = prepare_resume(str(attempt.attempt_path), [])
    assert attempt.attempt == 3
    assert again == config
    with pytest.raises(ConfigError, match=r"optimizer\.lr=1: is not allowed, it changes what .* computes"):
        prepare_resume(str(folder.path), ["optimizer.lr=1"])
    with pytest.raises(ConfigError, match="no run is there"):
        prepare_resume(str(tmp_path / "none"), [])
    folder.mark_finished({})
    with pytest.raises(ConfigError, match="is finished; allowed: an unfinished run"):
        prepare_resume(str(folder.path), [])
    assert not (folder.path / "attempt-4").exists()


def test_what_is_to_be_resumed_has_to_be_there(text: str, tmp_path: Path) -> None:
    told = overrides_for(text, tmp_path, "launcher.device=cpu")
    folder = folder_of(told)  # which has saved nothing
    for path in (folder.path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=f"resume: {path} is not allowed, no checkpoint is there"):
            prepare_run([*told, f"resume={path}"])
    with pytest.raises(ConfigError, match=r"resume\.weights_only: true is not allowed with resume=auto"):
        compose([*told, "resume.weights_only=true"])


def _attempts(folders: list[RunFolder]) -> list[tuple[str, int]]:
    return [(folder.path.name, folder.attempt) for folder in folders]


def test_a_run_begun_from_a_path_is_a_run_of_its_own_that_continues_itself(text: str, tmp_path: Path) -> None:
    """Back to step 2 of 4 with another learning rate; stopped; and the same command once more."""
    told = overrides_for(text, tmp_path, "train.steps=6", "checkpoint.interval_steps=2", "strategy=ddp")
    first = folder_of(told)
    back = [*told, f"resume={first.path}/checkpoints/save-0001-step-00000002"]
    begun = [folder_of(back), folder_of(back)]
    results = run_on_ranks(1, run_each, [(first, 4), (begun[0], 3), (begun[1], None)])[0]
    steps = [sorted({step for step, _ in result["losses"]}) for result in results]
    assert steps == [[0, 1, 2, 3, 4], [3], [4, 5, 6]]
    assert begun[0].path != first.path
    assert begun[0].path == begun[1].path
    fresh = [folder_of(told), folder_of([*told, "resume=none"]), folder_of([*told, "resume=none"])]
    assert _attempts(fresh) == [(first.path.name, 2), (f"{first.path.name}-2", 1), (f"{first.path.name}-3", 1)]


def _told(rank: int, folders: list[RunFolder]) -> list[list[str]]:
    return [_told_by(rank, folder) for folder in folders]


def _told_by(rank: int, folder: RunFolder) -> list[str]:
    """What a run says, and what it raises."""
    lines: list[str] = []
    console = Console(enabled=False)
    console.line = lines.append  # type: ignore[method-assign, assignment]
    with MetricsWriter(folder.metrics(rank), None) as metrics:
        try:
            Trainer(folder.config(), folder, torch.device("cpu"), console, metrics).run([])
        except RunFailure as error:
            lines.append(f"raised: {error}")
    return lines


def test_a_save_that_fails_is_told_and_ends_the_run_at_once_only_if_it_should(text: str, tmp_path: Path) -> None:
    told = overrides_for(text, tmp_path, "train.steps=5", "checkpoint.interval_steps=2", "strategy=ddp")
    kinds = ([], ["checkpoint.asynchronous=false"], ["checkpoint.stop_on_failure=true"])
    folders = [folder_of([*told, *more, f"name=run{index}"]) for index, more in enumerate(kinds)]
    for folder in folders:
        folder.checkpoints.write_text("in the way")
    for of_rank in run_on_ranks(2, _told, folders):
        for index, (folder, lines) in enumerate(zip(folders, of_rank, strict=True)):
            failures = [line for line in lines if "no checkpoint was saved: " in line]
            assert "FileExistsError" in failures[0]
            assert not folder.is_finished
            assert len(failures) == (4 if index < 2 else 2)  # at steps 2, 4 and 5, and why it is not finished
            assert failures[-1].startswith(f"raised: step {5 if index < 2 else 2}: "), failures


def _refused(rank: int, folder: RunFolder) -> str:
    with pytest.raises(ConfigError) as caught:
        run_to(rank, folder)
    return str(caught.value)


def test_one_attempt_at_a_time_trains_in_a_folder(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two would delete each other's half-written checkpoints."""
    monkeypatch.setattr(checkpoints, "_PATIENCE_SECONDS", 0.1)
    told = overrides_for(text, tmp_path, "train.steps=1", "strategy=ddp")
    first, second = folder_of(told), folder_of(told)
    assert first.path == second.path
    with FileLock(first.path / checkpoints.LOCK):
        for message in run_on_ranks(2, _refused, second):
            assert f"resume: auto is not allowed while other processes train in {first.path}" in message
    for _ in range(2):  # processes that have ended hold nothing
        run_on_ranks(1, run_to, second)
    assert second.is_finished


@pytest.mark.slow
def test_ctrl_c_and_resume_end_as_one_run(text: str, tmp_path: Path) -> None:
    told = overrides_for(text, tmp_path, "train.steps=200", "launcher.device=cpu", "checkpoint.interval_steps=20")
    run = subprocess.Popen([COMMAND, "train", *told], stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*/checkpoints/save-*")):
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    (path,) = (each for each in tmp_path.iterdir() if (each / "checkpoints").exists())
    command = [COMMAND, "resume", str(path), "strategy=ddp", "launcher.nproc_per_node=1"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "continuing from" in output
    assert open_run(path).is_finished
