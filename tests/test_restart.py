"""A killed worker is started again by torchrun or our own launcher, and the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import folder_of, overrides_for
from worker_processes import output, start_workers, wait_for

from dist_lowrank.checkpoint.folders import committed
from dist_lowrank.config import open_run
from dist_lowrank.exit_codes import ExitCode

BIN = Path(sys.executable).parent
SCRIPT = str(Path(__file__).parents[1] / "launch" / "train.py")
STEPS = 60
SETTINGS = (f"train.steps={STEPS}", "checkpoint.interval_steps=15", "train.eval_sequences=2", "launcher.threads=1")
LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "--max-restarts=2", SCRIPT],
    "dist-lowrank": [str(BIN / "dist-lowrank"), "train", "launcher.max_restarts=2"],
}


def _start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _ranks_of(launcher: int) -> list[int]:
    """The worker processes that a launcher has now."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(each) for each in children if b"RANK=" in Path(f"/proc/{each}/environ").read_bytes()]


def _wait_for_checkpoint(runs: Path) -> None:
    deadline = time.monotonic() + 90
    while not list(runs.glob("*/checkpoints/save-*")):
        assert time.monotonic() < deadline, "the run has not saved in 90 seconds"
        time.sleep(0.01)


def _last_state(run: Path) -> dict[str, torch.Tensor]:
    path = committed(run / "checkpoints")[-1]
    assert path.name.endswith(f"step-{STEPS:08d}")
    return {f"{file.name}/{name}": t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("dist-lowrank", marks=pytest.mark.slow)])
def test_after_a_killed_worker_the_run_continues_by_itself_and_ends_with_the_same_weights(
    text: str, tmp_path: Path, launcher: str
) -> None:
    undisturbed = folder_of(overrides_for(text, tmp_path / "undisturbed", *SETTINGS))
    assert wait_for(start_workers(undisturbed)) == [0, 0], output(undisturbed)

    runs = tmp_path / "runs"
    job = _start([*LAUNCHERS[launcher], *overrides_for(text, runs, *SETTINGS)], tmp_path)
    _wait_for_checkpoint(runs)
    os.kill(_ranks_of(job.pid)[-1], signal.SIGKILL)
    printed, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    (run,) = (path for path in runs.iterdir() if path.name != "cache")
    assert sorted(path.name for path in run.glob("attempt-*")) == ["attempt-1", "attempt-2"]
    assert open_run(run).is_finished
    assert "continuing from" in printed
    expected, found = _last_state(undisturbed.path), _last_state(run)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not _same_bits(expected[name], found[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_that_was_asked_to_stop_is_not_started_again(text: str, tmp_path: Path, launcher: str) -> None:
    settings = (*SETTINGS[1:], "train.steps=1000000")
    job = _start([*LAUNCHERS[launcher], *overrides_for(text, tmp_path / "runs", *settings)], tmp_path)
    _wait_for_checkpoint(tmp_path / "runs")
    os.kill(_ranks_of(job.pid)[-1], signal.SIGUSR1)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == (1 if launcher == "torchrun" else ExitCode.REQUEUE), errors
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "cache")
    assert [path.name for path in run.glob("attempt-*")] == ["attempt-1"]
    assert open_run(run).stopped is not None


@pytest.mark.parametrize(
    ("limit_minutes", "codes"),
    [(0.01, [ExitCode.REQUEUE] * 2), pytest.param(10_000, [ExitCode.FINISHED] * 2, marks=pytest.mark.slow)],
)
def test_the_time_limit_saves_and_stops_before_it(
    text: str, tmp_path: Path, limit_minutes: float, codes: list[ExitCode]
) -> None:
    settings = ("train.steps=4", f"train.time_limit_minutes={limit_minutes}", "train.time_limit_lead_minutes=0")
    folder = folder_of(overrides_for(text, tmp_path, *settings, "launcher.threads=1"))
    assert wait_for(start_workers(folder)) == codes, output(folder)  # this process, their launcher, is older than 0.6 s
    if codes[0] == ExitCode.REQUEUE:
        stopped = json.loads((folder.attempt_path / "stopped.json").read_text())
        assert stopped == {"exit_code": 75, "reason": "the time limit", "step": 1}
        assert committed(folder.checkpoints)[-1].name.endswith("step-00000001")
