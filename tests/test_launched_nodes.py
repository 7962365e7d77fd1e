"""Nodes that really start from rendered scripts: `launcher=torchrun` with two "hosts", both this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_launch import FOREVER, SMALL, folder  # noqa: F401 (a fixture)

from dist_lowrank.cli import main
from dist_lowrank.config import open_run
from dist_lowrank.exit_codes import ExitCode

CANARY = "canary-of-the-environment"
HOSTS = [
    "launcher=torchrun",
    "launcher.hosts=[127.0.0.1,localhost]",
    "launcher.nproc_per_node=1",
    "launcher.interface=lo",
    "launcher.remote_shell=[]",
    "launcher.secret_environment=[HF_TOKEN]",
]


def _start(run: Path, node: int) -> subprocess.Popen[str]:
    script = run / "attempt-1" / "launch" / f"node-{node}.sh"
    environment = {**os.environ, "HF_TOKEN": CANARY}
    return subprocess.Popen(
        [script], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/"
    )


def _steps(run: Path, attempt: int) -> int:
    path = run / f"attempt-{attempt}" / "metrics" / "rank_00001.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.mark.parametrize("starts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_nodes_train_stop_with_75_and_continue_from_the_same_scripts(
    folder: Path,  # noqa: F811 (the fixture)
    monkeypatch: pytest.MonkeyPatch,
    starts: int,
) -> None:
    """Node 1 comes first; a signal to one node stops both."""
    monkeypatch.chdir(folder)
    options = [each for each in SMALL if not each.startswith("launcher.nproc")]
    assert main(["launch", "--render-only", *options, *HOSTS, FOREVER]) == ExitCode.FINISHED
    (run,) = (folder / "runs").iterdir()
    stopped_at = []
    for attempt in range(1, starts + 1):
        nodes = [_start(run, 1)]
        time.sleep(1)
        nodes.append(_start(run, 0))
        deadline = time.monotonic() + 120
        while _steps(run, attempt) < 2 + sum(stopped_at[-1:]):
            assert time.monotonic() < deadline, "no step in two minutes"
            assert [node.poll() for node in nodes] == [None, None], [node.communicate()[0] for node in nodes]
            time.sleep(0.1)
        nodes[attempt - 1].send_signal(signal.SIGUSR1)
        output = "".join(node.communicate(timeout=60)[0] for node in nodes)
        assert [node.returncode for node in nodes] == [ExitCode.REQUEUE, ExitCode.REQUEUE], output
        assert output.count(f"run folder runs/{run.name}/attempt-{attempt} ") == 1
        assert "Traceback" not in output
        assert CANARY not in output
        stopped = open_run(run / f"attempt-{attempt}").stopped
        assert stopped is not None
        stopped_at.append(stopped["step"])
    assert stopped_at == sorted({0, *stopped_at})[1:], "each start goes on where the last one stopped"
    assert len(list(run.glob("attempt-*"))) == starts
    assert not [path for path in run.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
