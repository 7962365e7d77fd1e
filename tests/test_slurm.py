"""Jobs on a real Slurm: `launch launcher=slurm` trains, and what a scheduler does to a job changes no number.

Run by `make test-slurm`, which installs Debian's packages first. Every job has 2 nodes with 2 processes each, on
virtual hosts (cluster/slurm.py). Where a job has to be in the middle of its training, a slow network makes it last.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster.slurm import Slurm, slurm_cluster, why_not
from resumed_runs import assert_same_end
from small_runs import folder_of, overrides_for
from worker_processes import output, start_workers, wait_for

from dist_lowrank.checkpoint.folders import committed
from dist_lowrank.config import RunFolder, open_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

NODES = ["node0", "node1"]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
JOB = [
    "launcher=slurm",
    "launcher.nodes=2",
    "launcher.nproc_per_node=2",
    "launcher.device=cpu",
    "launcher.threads=1",
    "launcher.interface=eth0",
]


def _settings(steps: int, save_interval: int) -> list[str]:
    return [f"train.steps={steps}", f"checkpoint.interval_steps={save_interval}", "train.eval_sequences=4"]


def _launch(slurm: Slurm, folder: Path, overrides: list[str]) -> str:
    """Submits a run with our command and returns the job's number."""
    command = str(Path(sys.executable).with_name("dist-lowrank"))
    printed = slurm.run(command, "launch", *overrides, folder=folder)
    found = re.search(r"Submitted batch job (\d+)", printed)
    assert found, printed
    return found[1]


def _wait(
    slurm: Slurm, job: str, until: Callable[[dict[str, str]], bool], timeout_seconds: float = 600
) -> dict[str, str]:
    """Until something is so of a job; one that was requeued need not wait for the two minutes that Slurm gives it."""
    deadline = time.monotonic() + timeout_seconds
    while not until(known := slurm.job(job)):
        assert time.monotonic() < deadline, f"after {timeout_seconds:.0f} seconds the job is {known}"
        assert known["JobState"] not in ENDED, f"{known}\n{Path(known['StdOut']).read_text()}"
        if known["JobState"] == "PENDING" and known["Reason"] == "BeginTime":
            slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(0.2)
    return known


def _finish(slurm: Slurm, job: str) -> dict[str, str]:
    return _wait(slurm, job, lambda known: known["JobState"] == "COMPLETED")


def _wait_for_checkpoint(slurm: Slurm, job: str, runs: Path) -> None:
    _wait(slurm, job, lambda _: bool(list(runs.glob("*/checkpoints/save-*"))))


def _run_in(runs: Path) -> Path:
    (run,) = (path for path in runs.iterdir() if path.name != "cache")
    return run


def _undisturbed(text: str, runs: Path, *settings: str) -> RunFolder:
    """The same run in 4 processes of this machine."""
    folder = folder_of(overrides_for(text, runs, "launcher.threads=1", *settings))
    assert wait_for(start_workers(folder, world_size=4), timeout_seconds=200) == [0] * 4, output(folder)
    return folder


def test_a_job_trains_20_steps_on_2_nodes_of_2_processes_as_one_machine_would(text: str, tmp_path: Path) -> None:
    settings = _settings(20, save_interval=5)
    with slurm_cluster(NODES) as slurm:
        job = _launch(slurm, tmp_path, overrides_for(text, tmp_path / "runs", *JOB, *settings))
        known = _finish(slurm, job)
    assert (known["NumNodes"], known["Restarts"]) == ("2", "0")
    run = open_run(_run_in(tmp_path / "runs"))
    assert run.is_finished
    assert sorted(path.name for path in run.metrics(0).parent.iterdir()) == [f"rank_{r:05d}.jsonl" for r in range(4)]
    assert_same_end(run.path, _undisturbed(text, tmp_path / "undisturbed", *settings).path)


def test_a_job_that_comes_to_its_time_limit_saves_requeues_and_ends_with_the_same_weights(
    text: str, tmp_path: Path
) -> None:
    settings = _settings(60, save_interval=60)  # so that only the signal saves before
    # Slurm looks every 30 seconds whether the lead has begun: half a minute to a minute after the start. A step takes
    # more than a second on this network.
    limit = ["launcher.time_limit_minutes=2", "launcher.signal_seconds=60"]
    with slurm_cluster(NODES, latency_milliseconds=20) as slurm:
        job = _launch(slurm, tmp_path, overrides_for(text, tmp_path / "runs", *JOB, *settings, *limit))
        _wait(slurm, job, lambda _: bool(list(tmp_path.glob("runs/*/attempt-*/stopped.json"))))
        _wait(slurm, job, lambda known: known["JobState"] == "PENDING")
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # a busy machine would need many more times
        known = _finish(slurm, job)
    run = _run_in(tmp_path / "runs")
    assert open_run(run).is_finished
    attempts = [RunFolder(run, number + 1) for number in range(len(list(run.glob("attempt-*"))))]
    assert len(attempts) == int(known["Restarts"]) + 1
    stopped = attempts[-2].stopped
    assert stopped is not None
    assert (stopped["exit_code"], stopped["reason"]) == (75, "SIGUSR1")
    assert_same_end(run, _undisturbed(text, tmp_path / "undisturbed", *settings).path)


def test_a_job_whose_node_dies_is_requeued_and_ends_with_the_same_weights(text: str, tmp_path: Path) -> None:
    settings = _settings(12, save_interval=5)
    with slurm_cluster(NODES, latency_milliseconds=20) as slurm:
        job = _launch(slurm, tmp_path, overrides_for(text, tmp_path / "runs", *JOB, *settings))
        _wait_for_checkpoint(slurm, job, tmp_path / "runs")
        slurm.kill_node("node1")
        _wait(slurm, job, lambda known: int(known["Restarts"]) == 1)
        # Slurm gives a requeued job one node, and for good, where the lost one is back within the same second.
        time.sleep(10)
        slurm.start_node("node1")
        _finish(slurm, job)
    run = _run_in(tmp_path / "runs")
    assert open_run(run).is_finished
    assert sorted(path.name for path in run.glob("attempt-*")) == ["attempt-1", "attempt-2"]
    assert_same_end(run, _undisturbed(text, tmp_path / "undisturbed", *settings).path)


def test_a_cancelled_job_saves_and_leaves_no_process_and_the_same_script_continues_it(
    text: str, tmp_path: Path
) -> None:
    settings = _settings(12, save_interval=12)
    with slurm_cluster(NODES, latency_milliseconds=20) as slurm:
        job = _launch(slurm, tmp_path, overrides_for(text, tmp_path / "runs", *JOB, *settings))
        metrics = "runs/*/attempt-1/metrics/rank_00000.jsonl"
        _wait(slurm, job, lambda _: any(path.stat().st_size for path in tmp_path.glob(metrics)))
        slurm.run("scancel", job)
        _wait(slurm, job, lambda known: known["JobState"] == "CANCELLED")
        slurm.wait_for_nodes()
        assert [command for node in NODES for command in slurm.hosts.processes(node) if "dist_lowrank" in command] == []
        run = open_run(_run_in(tmp_path / "runs"))
        assert run.stopped is not None
        assert (run.stopped["exit_code"], run.stopped["reason"]) == (75, "SIGTERM")
        assert len(committed(run.checkpoints)) == 1
        again = slurm.run("sbatch", "--parsable", str(run.attempt_path / "launch" / "job.sbatch"), folder=tmp_path)
        _finish(slurm, again.strip())
    assert open_run(run.path).is_finished
    assert_same_end(run.path, _undisturbed(text, tmp_path / "undisturbed", *settings).path)
