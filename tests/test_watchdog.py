"""A rank that hangs is named on all ranks, and all of them end; so are ranks that would not compute the same."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from small_runs import folder_of, overrides_for
from worker_processes import KILLED, output, start_workers, wait_for

from dist_lowrank import rank_identity
from dist_lowrank.config import compose
from dist_lowrank.exit_codes import ExitCode, RanksDiffer
from dist_lowrank.rank_identity import compare_ranks, identity
from dist_lowrank.training.position import Position

QUICK = ("launcher.timeout_seconds=3", "train.steps=20", "train.eval_sequences=2", "launcher.threads=1")


def _act_at_step_3(action: Any) -> None:
    enter = Position.enter

    def entered(self: Position, phase: str, step: int | None = None) -> None:
        enter(self, phase, step)
        if self.step == 3 and phase == "backward":
            action()

    Position.enter = entered  # type: ignore[method-assign]


def _stop_on_its_own(rank: int) -> None:
    if rank == 1:
        _act_at_step_3(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def _sleep_for_ever(rank: int) -> None:
    if rank == 1:
        _act_at_step_3(lambda: time.sleep(1000))


def _stop_rank_0(rank: int) -> None:
    if rank == 0:
        _act_at_step_3(lambda: os.kill(os.getpid(), signal.SIGSTOP))


_BEHIND = (
    "rank 1 (process {1} on {host}) got no further for 3 seconds while the others wait for it: in backward of step 3"
)


@pytest.mark.parametrize(
    ("prepare", "strategy", "codes", "told"),
    [
        pytest.param(  # the fault matrix has it in `make test`
            *(_stop_on_its_own, "fsdp", [ExitCode.HANG, KILLED], "rank 1 (process {1} on {host}) gave no sign of life"),
            marks=pytest.mark.slow,
        ),
        (_sleep_for_ever, "ddp", [ExitCode.HANG] * 2, _BEHIND),
        pytest.param(
            *(_stop_rank_0, "fsdp", [KILLED, ExitCode.HANG], "rank 0 (process {0} on {host}) gave no sign of life"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_that_hangs_is_named_and_all_end(
    text: str, tmp_path: Path, prepare: Any, strategy: str, codes: list[int], told: str
) -> None:
    folder = folder_of(overrides_for(text, tmp_path, *QUICK, f"strategy={strategy}"))
    children = start_workers(folder, prepare)
    assert wait_for(children) == codes, output(folder)
    expected = told.format(*children, host=os.uname().nodename)
    for rank, code in enumerate(codes):
        if code == ExitCode.HANG:
            said = folder.error(rank).read_text()
            assert expected in said, said
            assert "this rank was in backward of step 3" in said


@pytest.mark.slow
def test_a_slow_rank_does_not_count_as_hanging(text: str, tmp_path: Path) -> None:
    def sleep(rank: int) -> None:
        if rank == 1:
            _act_at_step_3(lambda: time.sleep(1.5))

    folder = folder_of(overrides_for(text, tmp_path, *QUICK, "train.steps=4"))
    assert wait_for(start_workers(folder, sleep)) == [ExitCode.FINISHED] * 2, output(folder)


def _compare(rank: int, path: str, differs: bool) -> str:
    own = identity(compose([f"seed={int(differs and rank == 2)}"]))
    if differs and rank == 1:
        own |= {"version of torch": "1.0", "code of dist_lowrank": "0123456789ab"}
    store = dist.FileStore(path, 3)
    try:
        compare_ranks(store, rank, 3, own, 20)
    except RanksDiffer as error:
        return str(error)
    return "equal"


@pytest.mark.parametrize("differs", [True, False])
def test_ranks_with_another_configuration_code_or_version_are_named_on_all_ranks(tmp_path: Path, differs: bool) -> None:
    for told in run_on_ranks(3, _compare, str(tmp_path / "store"), differs, distributed=False):
        if differs:
            first, second = told.splitlines()
            assert first.startswith("rank 1 differs from rank 0: code of dist_lowrank 0123456789ab (rank 0: ")
            assert f"version of torch 1.0 (rank 0: {torch.__version__})" in first
            assert second == "rank 2 differs from rank 0: seed 1 (rank 0: 0)"
        else:
            assert told == "equal"


def _compare_without_rank_1(rank: int, path: str) -> str:
    if rank == 1:
        return ""
    try:
        compare_ranks(dist.FileStore(path, 2), rank, 2, {"code": "same"}, 1)
    except RanksDiffer as error:
        return str(error)
    return "equal"


def test_a_rank_that_does_not_start_is_named(tmp_path: Path) -> None:
    told = run_on_ranks(2, _compare_without_rank_1, str(tmp_path / "store"), distributed=False)[0]
    assert told == "rank 1 of 2 did not start within 1 seconds"


def test_the_code_of_two_versions_has_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        (tmp_path / "module.py").write_text(text)
        monkeypatch.setattr(rank_identity, "__file__", str(tmp_path / "rank_identity.py"))
        names.add(rank_identity._hash_of_source())
    assert len(names) == 2
