"""Runs that really start: one folder, the right exit code, and no process left behind, however they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import start_processes

from dist_lowrank.checkpoint import newest_good
from dist_lowrank.config import open_run
from dist_lowrank.exit_codes import ExitCode
from dist_lowrank.launchers.console import SharedConsole

COMMAND = str(Path(sys.executable).with_name("dist-lowrank"))
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
SCRIPT = str(Path(__file__).parents[1] / "launch" / "train.py")
SMALL = [
    "data=text",
    "data.path=text.txt",
    "data.cache=cache",
    "data.vocab_size=300",
    "data.sequence_length=16",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=1",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.eval_sequences=4",
    "train.export=false",
    "train.sample_tokens=0",
    "launcher.device=cpu",
    "launcher.nproc_per_node=2",
]
FOREVER = "train.steps=1000000"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    sentences = (f"{number} plus {number + 1} makes {2 * number + 1}, says the teacher.\n" for number in range(2000))
    (tmp_path / "text.txt").write_text("".join(sentences))
    yield tmp_path
    assert _processes_in(tmp_path) == [], "no process is left behind"


def _processes_in(folder: Path) -> list[int]:
    """Processes that work in a folder; a rank of a run that a test started, for instance."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            inside, state = os.readlink(process / "cwd") == str(folder), (process / "stat").read_text().split()[-50]
        except OSError:
            continue
        if inside and state != "Z":
            found.append(int(process.name))
    return found


def _start(folder: Path, command: list[str], variables: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _wait_for_steps(folder: Path) -> None:
    """Until the first rank has written the metrics of a step."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if any(path.stat().st_size for path in folder.glob("runs/*/attempt-1/metrics/rank_00000.jsonl")):
            return
        time.sleep(0.1)
    raise AssertionError("the run has not made a step in 90 seconds")


def _ranks(folder: Path, launcher: subprocess.Popen[str]) -> list[int]:
    return [process for process in _processes_in(folder) if process != launcher.pid]


def test_train_leaves_one_finished_run_folder(folder: Path) -> None:
    run = _start(folder, [COMMAND, "train", *SMALL, "train.steps=2"])
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    (path,) = (folder / "runs").iterdir()
    opened = open_run(path)
    first_line = output.splitlines()[0]
    assert f"runs/{path.name}/attempt-1" in first_line
    assert f"tensorboard --logdir runs/{path.name}" in first_line
    assert opened.is_finished
    for rank in (0, 1):
        assert json.loads(opened.metrics(rank).read_text().splitlines()[0])
        assert list(opened.tensorboard(rank).iterdir())


@pytest.mark.slow  # test_restart.py starts torchrun in `make test`
def test_torchrun_leaves_one_finished_run_folder(folder: Path) -> None:
    command = [TORCHRUN, "--standalone", "--nproc-per-node", "2", SCRIPT, *SMALL, "train.steps=2"]
    run = _start(folder, command)
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    (path,) = (folder / "runs").iterdir()
    assert open_run(path).is_finished
    assert output.count("tensorboard --logdir") >= 1
    assert [attempt.name for attempt in path.glob("attempt-*")] == ["attempt-1"]


def test_a_bad_key_under_torchrun_is_told_once_and_ends_all_ranks(folder: Path) -> None:
    command = [TORCHRUN, "--standalone", "--nproc-per-node", "2", SCRIPT, *SMALL, "optimizer.rnak=3"]
    run = _start(folder, command)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    assert errors.count("error: optimizer.rnak: 3 is not allowed, no such key; did you mean rank?") == 1
    assert errors.count("exitcode  : 2") == 2, errors
    assert not (folder / "runs").exists()


@pytest.mark.slow  # the next one is in `make test`
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_a_run_after_the_step_without_a_traceback(folder: Path, number: signal.Signals) -> None:
    run = _start(folder, ["nohup", COMMAND, "train", *SMALL, FOREVER])
    _wait_for_steps(folder)
    for process in _processes_in(folder):
        os.kill(process, signal.SIGHUP)  # the terminal closes, of which nohup keeps them
    run.send_signal(number)
    output, errors = run.communicate(timeout=30)
    assert "SIGHUP" not in output
    assert run.returncode == (ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.REQUEUE), errors
    assert "Traceback" not in errors
    assert "error" not in errors
    (saved,) = folder.glob("runs/*/checkpoints/save-0001-*")
    assert f"newest good checkpoint runs/{saved.relative_to(folder / 'runs')}" in output
    (path,) = (folder / "runs").iterdir()
    assert not open_run(path).is_finished


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGINT, signal.SIGTERM], ExitCode.INTERRUPTED),
        pytest.param([signal.SIGTERM], ExitCode.REQUEUE, marks=pytest.mark.slow),
        pytest.param([signal.SIGUSR1, signal.SIGTERM, signal.SIGINT], ExitCode.REQUEUE, marks=pytest.mark.slow),
    ],
)
def test_signals_that_come_while_the_ranks_save_do_not_cut_the_save_short(
    folder: Path, numbers: list[signal.Signals], code: ExitCode
) -> None:
    """Each once, then SIGTERM, again and again until the end."""
    run = _start(folder, [COMMAND, "train", *SMALL, FOREVER])
    _wait_for_steps(folder)
    sent = 0
    while run.poll() is None and sent < 5000:
        run.send_signal(numbers[sent] if sent < len(numbers) else signal.SIGTERM)
        sent += 1
        time.sleep(0.01)
    output, errors = run.communicate(timeout=30)
    assert sent > 3  # torch's own handler gives up at the third
    assert (run.returncode, errors) == (code, "")
    (saved,) = folder.glob("runs/*/checkpoints/*")
    assert saved.name.startswith("save-0001-")
    assert f"newest good checkpoint runs/{saved.relative_to(folder / 'runs')}" in output
    (path,) = (folder / "runs").iterdir()
    stopped = open_run(path).stopped
    assert stopped is not None
    assert saved.name.endswith(f"step-{stopped['step']:08d}")


@pytest.mark.slow
def test_a_second_ctrl_c_while_the_ranks_save_leaves_the_checkpoint_before(folder: Path) -> None:
    run = _start(folder, [COMMAND, "train", *SMALL, FOREVER, "checkpoint.interval_steps=50"])
    deadline = time.monotonic() + 90
    while not list(folder.glob("runs/*/checkpoints/save-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    time.sleep(0.05)  # a step takes a few milliseconds, a save and the end some ten times as much
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=20)
    assert run.returncode == ExitCode.INTERRUPTED
    _wait_until_gone(folder)
    (path,) = (folder / "runs").iterdir()
    kept = newest_good(path / "checkpoints")
    assert kept is not None
    done = int(kept.name.rpartition("-")[2])
    steps = f"train.steps={done + 1}"
    run = _start(folder, [COMMAND, "train", *SMALL, steps, f"resume={path}"])
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    assert f"step {done + 1}/{done + 1}" in output


def test_ctrl_c_while_the_workers_start_is_quiet_too(folder: Path) -> None:
    run = _start(folder, [COMMAND, "train", *SMALL, FOREVER])
    deadline = time.monotonic() + 60
    while len(_ranks(folder, run)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 130, errors
    assert "Traceback" not in errors


def test_the_launcher_starts_no_thread_that_a_signal_could_hit_half_started(capfd: pytest.CaptureFixture[str]) -> None:
    before = threading.enumerate()
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        workers = start_processes("ranks", "echo", {0: ("one",), 1: ("two",)}, {0: {}, 1: {}}, SharedConsole())
        assert threading.enumerate() == before
        assert not workers.wait(30).is_failed()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert sorted(capfd.readouterr().out.split()) == ["one", "two"]


def test_a_rank_that_waits_for_others_ends_at_once_by_a_signal(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # in the place of the launcher's store
        rank = _start_rank(folder, silent.getsockname()[1], os.getpid())
        silent.settimeout(60)
        with silent.accept()[0]:
            rank.send_signal(signal.SIGTERM)
            _, errors = rank.communicate(timeout=30)
    assert rank.returncode == -signal.SIGTERM
    assert errors == ""


def test_a_rank_whose_launcher_is_gone_when_it_starts_ends_at_once(folder: Path) -> None:
    rank = _start_rank(folder, 1, launcher=1)  # nothing listens at port 1, which torch would try for minutes
    _, errors = rank.communicate(timeout=60)
    assert (rank.returncode, errors) == (1, "")


def _start_rank(folder: Path, port: int, launcher: int) -> subprocess.Popen[str]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "dist_lowrank.worker", "runs/run", "--launcher", str(launcher)]
    return _start(folder, command, address)


def test_a_killed_rank_ends_the_run_with_code_1_and_is_named(folder: Path) -> None:
    run = _start(folder, [COMMAND, "train", *SMALL, FOREVER])
    _wait_for_steps(folder)
    victim = max(_ranks(folder, run))
    rank = dict(
        entry.split("=", 1) for entry in Path(f"/proc/{victim}/environ").read_text().split("\0") if "=" in entry
    )["RANK"]
    os.kill(victim, signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert f"error: rank {rank} of " in errors
    assert "was killed by SIGKILL; often the system ran out of memory" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_of_them(folder: Path) -> None:
    run = _start(folder, [COMMAND, "train", *SMALL, FOREVER])
    _wait_for_steps(folder)
    os.kill(max(_ranks(folder, run)), signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == ExitCode.REQUEUE, errors
    assert "error" not in errors


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_ends_with_code_76(folder: Path) -> None:
    run = _start(folder, [COMMAND, "train", *SMALL, FOREVER, "launcher.timeout_seconds=8", "launcher.stop_seconds=60"])
    _wait_for_steps(folder)
    victim = max(_ranks(folder, run))
    os.kill(victim, signal.SIGSTOP)
    _, errors = run.communicate(timeout=45)  # it does not wait for the stopped rank, which another one kills
    assert run.returncode == ExitCode.HANG, errors
    assert f"(process {victim} on " in errors
    assert "gave no sign of life for 8 seconds" in errors
    assert "no checkpoint was saved" in errors


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_at_once(folder: Path) -> None:
    run = _start(folder, [COMMAND, "train", *SMALL, FOREVER])
    _wait_for_steps(folder)
    os.kill(max(_ranks(folder, run)), signal.SIGSTOP)  # so that the run cannot stop after the step
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=20)  # far less than launcher.stop_seconds
    assert run.returncode == ExitCode.INTERRUPTED
    _wait_until_gone(folder)


@pytest.mark.slow
def test_killing_the_launcher_ends_the_ranks(folder: Path) -> None:
    run = _start(folder, [COMMAND, "train", *SMALL, FOREVER])
    _wait_for_steps(folder)
    run.kill()
    run.communicate(timeout=30)
    _wait_until_gone(folder)


def _wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + 10
    while _processes_in(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
