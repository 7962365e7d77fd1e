"""Runs over several hosts with a network between them: the numbers of one host, and life after the loss of one.

Run by `make test-hosts`, as root: the hosts are network namespaces of this machine (cluster/hosts.py).
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster.hosts import VirtualHosts, virtual_hosts, why_not
from resumed_runs import assert_same_end
from small_runs import folder_of, overrides_for
from worker_processes import output, start_workers, wait_for

from dist_lowrank.checkpoint.folders import committed
from dist_lowrank.config import open_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

LAUNCH = str(Path(sys.executable).with_name("dist-lowrank")), "launch", "launcher=torchrun"
SETTINGS = ["train.global_batch_size=12", "train.eval_sequences=6", "launcher.threads=1"]


def _launch(hosts: VirtualHosts, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """Starts a run on all hosts, as a user does who has `ssh` to them."""
    given = [
        f"launcher.hosts=[{','.join(hosts.names)}]",
        f"launcher.remote_shell=[{','.join(hosts.remote_shell)}]",
        "launcher.rendezvous=c10d",
        "launcher.nproc_per_node=1",
        "launcher.device=cpu",
        "launcher.interface=eth0",
    ]
    return subprocess.Popen(
        [*LAUNCH, *given, *overrides], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _run_in(runs: Path) -> Path:
    (run,) = (path for path in runs.iterdir() if path.name != "cache")
    return run


@pytest.mark.parametrize("count", [2, 3])
def test_training_over_hosts_on_a_slow_network_is_to_the_bit_that_of_one_host(
    text: str, tmp_path: Path, count: int
) -> None:
    settings = [*SETTINGS, "train.steps=20"]
    with virtual_hosts(
        [f"node{number}" for number in range(count)], megabits_per_second=100, latency_milliseconds=2
    ) as hosts:
        job = _launch(hosts, tmp_path, *overrides_for(text, tmp_path / "runs", *settings))
        printed, _ = job.communicate(timeout=300)
    assert job.returncode == 0, printed
    run = _run_in(tmp_path / "runs")
    assert open_run(run).is_finished
    alone = folder_of(overrides_for(text, tmp_path / "alone", *settings))
    assert wait_for(start_workers(alone, world_size=count)) == [0] * count, output(alone)
    assert_same_end(run, alone.path)


def test_when_a_host_is_cut_off_for_good_the_others_continue_from_the_newest_checkpoint(
    text: str, tmp_path: Path
) -> None:
    settings = [*SETTINGS, "train.steps=60", "checkpoint.interval_steps=10"]
    elastic = [
        "launcher.min_nodes=2",
        "launcher.max_restarts=3",
        "launcher.timeout_seconds=10",
        "launcher.stop_seconds=10",
    ]
    with virtual_hosts(["node0", "node1", "node2"], latency_milliseconds=10) as hosts:
        job = _launch(hosts, tmp_path, *overrides_for(text, tmp_path / "runs", *settings, *elastic))
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("runs/*/checkpoints/save-*")):
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline, "the run has not saved in 200 seconds"
            time.sleep(0.05)
        hosts.cut_off("node2")
        saved = committed(_run_in(tmp_path / "runs") / "checkpoints")[-1]  # perhaps one more comes through
        printed, _ = job.communicate(timeout=300)
    assert job.returncode == 0, printed
    run = _run_in(tmp_path / "runs")
    assert open_run(run).is_finished
    assert "on node2) gave no sign of life" in printed
    continued = re.search(r"continuing from (\S+), after step", printed)
    assert continued, printed
    assert continued[1] >= str(saved)
    ranks = {path.name: len(list(path.glob("metrics/*"))) for path in run.glob("attempt-*")}
    assert ranks == {"attempt-1": 3, "attempt-2": 2}
