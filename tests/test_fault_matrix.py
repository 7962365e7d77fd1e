"""Each fault in each phase: the documented outcome, no committed checkpoint lost, and the run goes on to the bit."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import FAULTS_PAGE
from fault_matrix import CELLS, QUICK, Outcome, outcome_of, render, table_in
from faults import AT_STEP, STRUCK, Fault
from safetensors.torch import load_file
from small_runs import folder_of, overrides_for
from worker_processes import output, start_workers, wait_for

from dist_lowrank.checkpoint.folders import committed, step_of
from dist_lowrank.checkpoint.manifest import open_checkpoint, verify_files
from dist_lowrank.config import RunFolder, begin_again, compose
from dist_lowrank.config.validate import from_dict, to_dict
from dist_lowrank.exit_codes import ExitCode

SETTINGS = (
    *("train.steps=9", "train.eval_sequences=2", "train.max_skipped_steps=2"),
    *("optimizer.refresh_interval=2", "optimizer.error_feedback=fp32"),
    *("checkpoint.interval_steps=2", "checkpoint.keep_last=9", "launcher.threads=1"),
)


@pytest.fixture(scope="module")
def undisturbed(text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The last checkpoint of a run that nothing happens to."""
    folder = folder_of(overrides_for(text, tmp_path_factory.mktemp("undisturbed"), *SETTINGS))
    assert wait_for(start_workers(folder)) == [0, 0], output(folder)
    return _last_state(folder)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, which can really be full."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def _parameters() -> list[object]:
    marks = {False: [pytest.mark.slow], True: []}
    return [pytest.param(*cell, marks=marks[cell in QUICK], id="-".join(cell)) for cell in CELLS]


@pytest.mark.parametrize(("kind", "place"), _parameters())
def test_a_fault_has_its_documented_outcome_and_the_run_goes_on(
    text: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    undisturbed: dict[str, torch.Tensor],
    kind: str,
    place: str,
) -> None:
    if kind == "full disk":
        request.getfixturevalue("disk")
    expected = outcome_of(kind, place)
    timeout = f"launcher.timeout_seconds={4 if kind == 'SIGSTOP' else 60}"
    waits = f"checkpoint.asynchronous={str(place == 'save').lower()}"  # else a save may be under way in other phases
    overrides = overrides_for(text, tmp_path, *SETTINGS, timeout, waits)
    folder = folder_of(overrides)
    children = start_workers(folder, lambda rank: Fault(kind, place, folder).arm() if rank == 1 else None)
    codes = wait_for(children)
    said = _said(folder)
    assert codes == list(expected.codes), said
    assert expected.says in said, said
    if kind == "SIGSTOP":
        assert f"rank 1 (process {children[1]}" in said
    _assert_nothing_is_lost(folder, kind)

    if kind == "full disk":
        os.unlink(tmp_path / "filler")
    if not expected.ends_at_once:
        folder = _continue(folder, overrides, expected, kind)
    assert folder.is_finished
    if expected.same:
        _assert_equal(_last_state(folder), undisturbed)
    else:
        last = open_checkpoint(committed(folder.checkpoints)[-1])
        assert last.sidecar.step == 9
        assert last.sidecar.progress["skipped_steps"] == 1


def test_a_run_whose_last_state_cannot_be_saved_is_not_finished(text: str, tmp_path: Path) -> None:
    overrides = overrides_for(text, tmp_path, *SETTINGS, f"train.steps={AT_STEP}")
    folder = folder_of(overrides)
    fault = Fault("exception", "save", folder)
    codes = wait_for(start_workers(folder, lambda rank: fault.arm() if rank == 1 else None))
    assert codes == [ExitCode.FAILED] * 2, _said(folder)
    assert "a fault of the test (rank 1); so the run is not finished" in _said(folder)
    assert not folder.is_finished
    folder = begin_again(folder)
    assert wait_for(start_workers(folder)) == [0, 0], _said(folder)
    assert folder.is_finished
    assert step_of(committed(folder.checkpoints)[-1]) == AT_STEP


def _continue(folder: RunFolder, overrides: list[str], expected: Outcome, kind: str) -> RunFolder:
    """Starts again, once more if that is to be refused; returns the attempt that ended well."""
    if expected.then is not None:
        folder = begin_again(folder)
        codes = wait_for(start_workers(folder, _with_another_seed if kind == "wrong configuration" else lambda _: None))
        said = _said(folder)
        assert codes == [expected.then] * 2, said
        if kind == "wrong configuration":
            assert "rank 1 differs from rank 0: seed 7 (rank 0: 0)" in said
        else:
            newest, before = committed(folder.checkpoints)[-1:-3:-1]
            assert f"{newest}/shard-" in said
            assert f"The one before it is {before}" in said
    if kind == "corrupted shard":
        folder = folder_of([*overrides, "resume.fallback=true"])
        assert folder.attempt == 3
    else:
        folder = begin_again(folder)
    assert wait_for(start_workers(folder)) == [0, 0], _said(folder)
    assert "continuing from" in output(folder)
    return folder


def _with_another_seed(rank: int) -> None:
    if rank == 1:
        config = RunFolder.config
        RunFolder.config = lambda folder: from_dict({**to_dict(config(folder)), "seed": 7})  # type: ignore[method-assign]


def _said(folder: RunFolder) -> str:
    errors = [path.read_text() for path in folder.attempt_path.glob("errors/*")]
    return "\n".join([output(folder, 0), output(folder, 1), *errors])


def _assert_nothing_is_lost(folder: RunFolder, kind: str) -> None:
    """Every checkpoint that was committed when the fault struck is there and whole, and so are later ones."""
    now = committed(folder.checkpoints)
    before: list[str] = [path.name for path in now]
    if (folder.path / STRUCK).exists():
        before = json.loads((folder.path / STRUCK).read_text())
        assert before, "there was a checkpoint to lose"
    assert set(before) <= {path.name for path in now}
    for path in now:
        if kind != "corrupted shard" or path.name != before[-1]:
            verify_files(open_checkpoint(path))
    assert AT_STEP - 2 in [step_of(path) for path in now]


def _last_state(folder: RunFolder) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint, random state included, by name and file."""
    path = committed(folder.checkpoints)[-1]
    assert step_of(path) == 9
    files = sorted(path.glob("*.safetensors"))
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    bits = [{name: t.reshape(-1).view(torch.uint8) for name, t in each.items()} for each in (found, expected)]
    assert [name for name in expected if not torch.equal(bits[0][name], bits[1][name])] == []


def test_the_page_shows_what_the_tests_check() -> None:
    """`make fault-matrix` also runs them all."""
    assert table_in(FAULTS_PAGE.read_text()) == render()
    assert 3 * len(QUICK) >= len(CELLS)
    assert {kind for kind, _ in QUICK} == {kind for kind, _ in CELLS}
    assert compose().train.max_skipped_steps == 10  # as the page says
