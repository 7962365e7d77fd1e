"""`dist-lowrank sweep`: what it starts, what it refuses, and how it goes on after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_runs import overrides_for, run_loop

from dist_lowrank.cli import main
from dist_lowrank.config import ConfigError, compose, create
from dist_lowrank.exit_codes import ExitCode
from dist_lowrank.sweep.points import Point, make_sweep
from dist_lowrank.sweep.slots import _environments
from dist_lowrank.sweep.verb import sweep
from dist_lowrank.worker import end_with_parent

COMMAND = str(Path(sys.executable).with_name("dist-lowrank"))


class ForkedPoint:
    """A real run of one point in a fork of this process, which has imported torch already."""

    def __init__(self, point: Point, environment: Mapping[str, str]) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_train_point(point))

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def _train_point(point: Point) -> int:
    end_with_parent()
    with point.console.open("a") as console, contextlib.redirect_stdout(console):
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            torch.set_num_threads(1)
            config = compose(point.train_overrides)
            (point.folder / "pids").open("a").write(f"{os.getpid()}\n")
            store = dist.FileStore(str(point.folder / f"store-{os.getpid()}"), 1)
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
            run_loop(0, create(config, point.train_overrides))
            return 0
        except BaseException:
            print("error: " + traceback.format_exc(), file=console)
            return 1


def overrides_of(text: str, runs: Path, *more: str) -> list[str]:
    return overrides_for(text, runs, "launcher.device=cpu", "launcher.nproc_per_node=1", "train.sample_tokens=0", *more)


def _in_fork(overrides: list[str], console: Path) -> int:
    """Starts the sweep in a process of its own; returns its number."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            with console.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                try:
                    code = sweep(overrides, start=ForkedPoint)
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def test_a_sweep_killed_in_the_middle_goes_on_where_it_was(text: str, tmp_path: Path) -> None:
    grid = ["optimizer=adamw,dct_adamw", "seed=0,1", "train.steps=15"]
    overrides, console = overrides_of(text, tmp_path / "runs", *grid), tmp_path / "console.txt"
    killed = _in_fork(overrides, console)
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("runs/sweep-*/points/002-*/*/attempt-1/metrics/*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    (folder,) = (tmp_path / "runs").glob("sweep-*")
    assert folder.name.startswith("sweep-optimizer-seed-")
    started = {path.name: path for path in (folder / "points").iterdir()}
    assert set(started) <= {
        "001-optimizer=adamw,seed=0",
        "002-optimizer=adamw,seed=1",
        "003-optimizer=dct_adamw,seed=0",
    }
    pids = [int(line) for path in started.values() for line in (path / "pids").read_text().splitlines()]
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)  # until init has buried the point, which the system killed with its sweep
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids)
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("points/*/*/FINISHED")}
    assert 1 <= len(finished) <= 3
    half_run = [path for path in started.values() if not list(path.glob("*/FINISHED"))]
    statuses = [point["status"] for point in json.loads((folder / "sweep.json").read_text())["points"]]
    assert statuses.count("finished") in (len(finished), len(finished) - 1), "the kill may come between the two"

    _, status = os.waitpid(_in_fork(overrides, console), 0)
    told = console.read_text()
    assert os.waitstatus_to_exitcode(status) == 0, told
    assert f"{len(finished)} of 4 points were finished before" in told
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    for path in half_run:
        assert sorted(each.name for each in path.glob("*/attempt-*")) == ["attempt-1", "attempt-2"]
    points = json.loads((folder / "sweep.json").read_text())["points"]
    assert [point["name"] for point in points] == [
        f"optimizer={name} seed={seed}" for name in ("adamw", "dct_adamw") for seed in (0, 1)
    ]
    assert all(point["status"] == "finished" and Path(point["run"], "FINISHED").exists() for point in points)
    report = json.loads((folder / "comparison" / "compare.json").read_text())
    assert [[run["seed"] for run in group["runs"]] for group in report["groups"]] == [[0, 1], [0, 1]]
    assert report["baseline"] == "llama_tiny-adamw"
    assert all(group["quantities"]["loss.validation"]["runs"] == 2 for group in report["groups"])
    assert (folder / "comparison" / "compare.html").exists()


def test_a_point_that_dies_is_reported_and_the_others_go_on(
    text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def kill_the_second(point: Point, environment: Mapping[str, str]) -> ForkedPoint:
        process = ForkedPoint(point, environment)
        if point.name == "seed=1" and not (tmp_path / "healthy").exists():
            process.kill()
        return process

    grid = ["optimizer=adamw", "train.steps=2", "seed=0,1,2"]
    overrides = overrides_of(text, tmp_path / "runs", *grid)
    assert sweep(overrides, jobs="2", start=kill_the_second) == 1
    printed = capfd.readouterr()
    assert "error: point 2/3 seed=1 failed with exit code -9; see " in printed.err
    assert "- Failed and not in here: seed=1." in printed.out
    (folder,) = (tmp_path / "runs").glob("sweep-seed-*")
    state = json.loads((folder / "sweep.json").read_text())["points"]
    assert [(point["status"], point["exit_code"]) for point in state] == [
        ("finished", 0),
        ("failed", -9),
        ("finished", 0),
    ]
    assert json.loads((folder / "comparison" / "compare.json").read_text())["groups"][0]["runs"][1]["seed"] == 2
    (tmp_path / "healthy").touch()
    assert sweep(overrides, start=kill_the_second) == 0, "the same command tries it again, and it alone"
    printed = capfd.readouterr()
    assert "2 of 3 points were finished before" in printed.out
    assert re.findall(r"^point .* starts$", printed.out, re.MULTILINE) == ["point 2/3 seed=1 starts"]
    assert all(len(line) < 120 for line in printed.out.split("Summary")[0].splitlines()[1:]), "no long paths"


def test_a_second_process_does_not_run_the_same_sweep(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = overrides_of(text, tmp_path / "runs", "optimizer=adamw", "train.steps=2", "seed=0,1")

    def start_again(point: Point, environment: Mapping[str, str]) -> ForkedPoint:
        with pytest.raises(ConfigError, match=r"^sweep: another process runs .*; allowed: one at a time"):
            sweep(overrides, start=ForkedPoint)
        os.kill(os.getpid(), signal.SIGTERM)  # a stop, at the worst moment: while a point starts
        return ForkedPoint(point, environment)

    assert sweep(overrides, start=start_again) == ExitCode.REQUEUE
    (folder,) = (tmp_path / "runs").glob("sweep-*")
    statuses = [point["status"] for point in json.loads((folder / "sweep.json").read_text())["points"]]
    assert statuses == ["stopped", "waiting"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["seed=1"],
            "error: sweep: no key has several values; allowed: such as optimizer=adamw,galore or seed=0,1,2\n",
        ),
        (
            ["optimizer=adamw,galore", "optimizer.rank=0.5"],
            "error: optimizer.rank: 0.5 is not allowed, no such key; allowed of optimizer: betas, eps, lr, name, "
            "weight_decay (point optimizer=adamw)\n",
        ),
        (
            ["optimizer=adamw,galor", "train.global_batch_size=3,4"],
            "error: train.global_batch_size: 3 is not allowed with 2 processes; allowed: a multiple of 2, such as ",
        ),
        (["seed=0,1,0"], "error: seed=0: is the same run as seed=0; allowed: each run once (point seed=0)\n"),
        (["optimizer=glob(*)"], "error: optimizer: glob(*) is not allowed in a sweep; allowed: a,b,c or choice(a,b,c)"),
        (["optimizer.lr=interval(0,1)"], "error: optimizer.lr: interval(0,1) is not allowed in a sweep; allowed: a,b"),
        (["seed=shuffle(0,1)"], "error: seed: shuffle(0,1) is not allowed in a sweep; allowed: a,b,c or "),
        (["seed=0,1", "not an override"], "error: not an override: is not an override that"),
        (["seed=0,1", "--jobs", "many"], "error: --jobs: many is not allowed; allowed: an integer >= 1, or fit (here "),
        (["seed=0,1", "--assert", "1"], "error: --assert 1: 1 is no comparison; allowed: "),
    ],
)
def test_bad_points_are_refused_before_anything_starts(
    overrides: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "launcher.device=cpu", *overrides]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def _names(overrides: Sequence[str]) -> list[str]:
    return [point.name for point in make_sweep(overrides, compose).points]


def test_the_last_key_varies_fastest_and_lists_are_one_value() -> None:
    assert _names(["optimizer=adamw,trion", "train.steps=7", "seed=range(2)"]) == [
        "optimizer=adamw seed=0",
        "optimizer=adamw seed=1",
        "optimizer=trion seed=0",
        "optimizer=trion seed=1",
    ]
    assert _names(["optimizer.betas=[0.9,0.99],[0.9,0.999]"]) == [
        "optimizer.betas=[0.9,0.99]",
        "optimizer.betas=[0.9,0.999]",
    ]
    assert _names(["+model.config.layer_types=null,[a]"])[1] == "+model.config.layer_types=[a]"


def test_a_sweep_finds_its_folder_again_and_another_one_has_another() -> None:
    def folder(*overrides: str) -> str:
        return make_sweep(overrides, compose).folder.name

    assert folder("seed=0,1") == folder("seed=0,1", "launcher.threads=1", "runs=elsewhere")
    assert folder("seed=0,1") != folder("seed=0,1,2")
    assert folder("seed=0,1") != folder("seed=0,1", "strategy=ddp")
    assert folder("strategy=ddp,fsdp").startswith("sweep-strategy-")


def test_points_that_run_together_share_neither_gpus_nor_cores() -> None:
    assert _environments(2, "fit", ["0", "1", "5", "7", "8"], 64, {}) == [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "5,7"},
    ]
    assert _environments(2, "3", None, 12, {}) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert _environments(2, "3", None, 12, {"OMP_NUM_THREADS": "1"}) == [{"OMP_NUM_THREADS": "1"}] * 3
    assert len(_environments(2, "fit", None, 12, {})) == 6
    assert _environments(8, "fit", None, 2, {}) == [{}]
    assert _environments(2, "1", ["0", "1"], 2, {}) == [{}]
    with pytest.raises(
        ConfigError, match=r"^--jobs: 3 is not allowed, 3 points of 2 ranks need 6 GPUs and 4 are visible"
    ):
        _environments(2, "3", ["0", "1", "2", "3"], 2, {})


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_survives_a_kill_and_writes_its_report(tmp_path: Path) -> None:
    """Three optimizers, two seeds, the default model; as a user types it."""
    grid = ["optimizer=adamw,galore,dct_adamw", "seed=0,1", "train.steps=10", "train.eval_interval=5"]
    short = ["train.eval_sequences=32", "train.export=false", "launcher.device=cpu", "launcher.threads=1"]
    command = [COMMAND, "sweep", *grid, *short, "--assert", "state_bytes.max <= 0.9 * baseline"]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(tmp_path.glob("runs/sweep-*/points/002-*/*/attempt-1/metrics/rank_00000.jsonl")):
        assert first.poll() is None
        time.sleep(0.1)
    first.kill()
    first.communicate()
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "1 of 6 points were finished before" in second.stdout
    (folder,) = (tmp_path / "runs").glob("sweep-*")
    assert len(list(folder.glob("points/*/*/FINISHED"))) == 6
    assert len(list(folder.glob("points/002-*/*/attempt-*"))) == 2
    report = json.loads((folder / "comparison" / "compare.json").read_text())
    assert [len(group["runs"]) for group in report["groups"]] == [2, 2, 2]
