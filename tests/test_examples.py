"""Every example runs under torchrun, and one process, two, and a run that was resumed print the same losses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def _start(processes: int, example: str, *arguments: str | Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [TORCHRUN, "--standalone", f"--nproc-per-node={processes}", str(ROOT / "examples" / example), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _losses(run: subprocess.Popen[str]) -> dict[int, float]:
    """What an example prints, by step, when it has ended."""
    try:
        output, errors = run.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        run.terminate()  # torchrun ends its workers
        output, errors = run.communicate()
    assert run.returncode == 0, errors
    losses = {int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss (\S+)$", output, re.M)}
    assert losses, output
    return losses


def _assert_learns(losses: dict[int, float]) -> None:
    assert losses[max(losses)] < 0.75 * losses[1]


def test_the_bare_loop_is_the_same_on_one_rank_and_on_two_then_one(tmp_path: Path) -> None:
    one = _start(1, "bare_loop.py")
    first = _losses(_start(2, "bare_loop.py", "--steps", "10", "--save", tmp_path / "checkpoint"))
    rest = _losses(_start(1, "bare_loop.py", "--load", tmp_path / "checkpoint"))
    expected = _losses(one)
    assert (list(first), list(rest)) == (list(range(1, 11)), list(range(11, 21)))
    assert {**first, **rest} == pytest.approx(expected, rel=1e-5)
    _assert_learns(expected)


def test_accelerate_gives_the_same_on_one_rank_and_two() -> None:
    one, two = _start(1, "with_accelerate.py"), _start(2, "with_accelerate.py")
    expected = _losses(one)
    assert len(expected) == 12
    assert _losses(two) == pytest.approx(expected, rel=1e-5)
    _assert_learns(expected)


def test_the_hugging_face_trainer_gives_the_same_on_one_rank_on_two_and_resumed_on_one(tmp_path: Path) -> None:
    one = _start(1, "with_trainer.py", "--output", tmp_path / "one")
    found = _losses(_start(2, "with_trainer.py", "--output", tmp_path / "two"))
    checkpoint = tmp_path / "two" / "checkpoint-6"
    resumed = _losses(_start(1, "with_trainer.py", "--output", tmp_path / "resumed", "--resume", checkpoint))
    expected = _losses(one)
    assert len(expected) == 10
    assert found == pytest.approx(expected, rel=1e-5)
    assert list(resumed) == [7, 8, 9, 10]
    assert resumed == pytest.approx({step: expected[step] for step in resumed}, rel=1e-5)
    _assert_learns(expected)
