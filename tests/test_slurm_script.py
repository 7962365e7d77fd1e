"""What job.sbatch does when Slurm does not answer and when signals come early, in bash with stand-ins for Slurm.

`test_slurm.py` has the same script on a real Slurm, which does not fail when a test wants it to.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launch_jobs import golden_job, rendered

_STEP = """\
trap 'echo step USR1 >> said; exit 75' USR1
trap 'echo step TERM >> said; exit 75' TERM
echo step >> said
while :; do read -rt 0.02 < <(:) || :; done
"""


class _Job:
    """The script of a job in a folder; its commands write into `said` what happened."""

    def __init__(self, folder: Path, script: str, squeue: str, scontrol: str = ":", srun: str = _STEP) -> None:
        self.folder = folder
        (folder / "said").touch()
        self._command("squeue", f"echo squeue >> said; {squeue}")
        self._command("scontrol", f'[ "$1" = requeue ] && echo requeue >> said; {scontrol}')
        self._command("srun", srun)
        self._command("sleep", ":")
        (folder / "job.sbatch").write_text(script)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n0"}
        self.process = subprocess.Popen(["bash", "job.sbatch"], cwd=folder, env=environment)

    def _command(self, name: str, text: str) -> None:
        (self.folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (self.folder / name).chmod(0o755)

    @property
    def said(self) -> list[str]:
        return (self.folder / "said").read_text().splitlines()

    def wait_for(self, word: str) -> None:
        deadline = time.monotonic() + 20
        while word not in self.said:
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)

    def stop_step(self, number: signal.Signals) -> list[str]:
        self.wait_for("step")
        self.process.send_signal(number)
        assert self.process.wait(timeout=20) == 75
        assert self.said[:2] == ["step", f"step {number.name.removeprefix('SIG')}"]
        return self.said[2:]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return rendered(golden_job("slurm", tmp_path, monkeypatch))["job.sbatch"]


def test_a_stopped_job_is_requeued_although_squeue_fails_once_or_always(tmp_path: Path, script: str) -> None:
    once = _Job(tmp_path, script, squeue="[ -e asked ] && echo RUNNING || { touch asked; exit 1; }")
    assert once.stop_step(signal.SIGUSR1) == ["squeue", "squeue", "requeue"]
    (tmp_path / "said").unlink()
    always = _Job(tmp_path, script, squeue="exit 1")
    assert always.stop_step(signal.SIGUSR1) == ["squeue"] * 5 + ["requeue"]


def test_a_cancelled_job_is_not_requeued_although_squeue_fails(tmp_path: Path, script: str) -> None:
    assert _Job(tmp_path, script, squeue="exit 1").stop_step(signal.SIGTERM) == ["squeue"] * 5
    (tmp_path / "said").unlink()
    assert _Job(tmp_path, script, squeue="echo COMPLETING").stop_step(signal.SIGUSR1) == ["squeue"]


def test_a_signal_before_the_step_stops_and_requeues_the_job(tmp_path: Path, script: str) -> None:
    slow = '[ "$2" = hostnames ] && { echo asked >> said; until [ -e go ]; do :; done; }'
    job = _Job(tmp_path, script, squeue="echo RUNNING", scontrol=slow)
    job.wait_for("asked")
    job.process.send_signal(signal.SIGUSR1)
    (tmp_path / "go").touch()
    assert job.process.wait(timeout=20) == 75
    assert job.said == ["asked", "squeue", "requeue"]
