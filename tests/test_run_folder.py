"""The run folder: one run, one folder, whoever starts it and however often."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dist_lowrank.config import ConfigError, RunFolder, compose, create, digest, open_run
from dist_lowrank.config.run_folder import write_atomically


def start(runs: Path, *overrides: str) -> RunFolder:
    given = [f"runs={runs}", *overrides]
    return create(compose(given), given)


def test_a_run_is_named_by_model_optimizer_and_digest(tmp_path: Path) -> None:
    folder = start(tmp_path, "optimizer=trion")
    assert folder.path.name == f"llama_tiny-trion-{digest(compose(['optimizer=trion']))}"
    assert start(tmp_path, "name=mine").path.name == f"mine-{digest(compose())}"


def test_an_attempt_holds_its_configuration_what_was_typed_and_where_it_came_from(tmp_path: Path) -> None:
    folder = start(tmp_path, "optimizer.rank=0.5", "train.steps=7")
    record = json.loads((folder.attempt_path / "run.json").read_text())
    assert folder.config() == compose([f"runs={tmp_path}", "optimizer.rank=0.5", "train.steps=7"])
    assert record["digest"] == digest(folder.config())
    assert record["versions"]["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    typed = (folder.attempt_path / "overrides.txt").read_text().splitlines()
    assert typed == [f"runs={tmp_path}", "optimizer.rank=0.5", "train.steps=7"]
    provenance = json.loads((folder.attempt_path / "provenance.json").read_text())
    assert {"command", "started", "hostname", "git_commit", "git_changes"} <= provenance.keys()


def test_ranks_have_their_own_files_and_their_folders_exist(tmp_path: Path) -> None:
    folder = start(tmp_path)
    assert folder.tensorboard(3) == folder.attempt_path / "tensorboard" / "rank_00003"
    assert folder.metrics(3) == folder.attempt_path / "metrics" / "rank_00003.jsonl"
    assert folder.tensorboard(0).parent.is_dir()
    assert folder.metrics(0).parent.is_dir()


def test_an_unfinished_run_gets_another_attempt_even_under_another_strategy(tmp_path: Path) -> None:
    first, second = start(tmp_path), start(tmp_path, "strategy=ddp", "launcher.nproc_per_node=4")
    assert first.path == second.path
    assert (first.attempt, second.attempt) == (1, 2)
    assert (first.config().strategy.name, second.config().strategy.name) == ("fsdp", "ddp")


def test_a_finished_run_gets_a_fresh_folder(tmp_path: Path) -> None:
    first = start(tmp_path)
    first.mark_finished({"validation_loss": 1.5})
    assert first.is_finished
    assert json.loads((first.path / "FINISHED").read_text()) == {"attempt": 1, "validation_loss": 1.5}
    second = start(tmp_path)
    assert (second.path.name, second.attempt) == (f"{first.path.name}-2", 1)
    assert start(tmp_path).attempt_path == second.path / "attempt-2"
    second.mark_finished({})
    assert start(tmp_path).path.name == f"{first.path.name}-3"


def test_commands_that_start_together_get_different_attempts(tmp_path: Path) -> None:
    config = compose([f"runs={tmp_path}"])
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: create(config, []), range(16)))
    assert sorted(folder.attempt for folder in folders) == list(range(1, 17))
    assert all(folder.config() == config for folder in folders)


def test_processes_that_start_together_get_different_attempts(tmp_path: Path) -> None:
    script = (
        "import sys; from dist_lowrank.config import compose, create\n"
        "print(create(compose([f'runs={sys.argv[1]}']), []).attempt)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(int(process.communicate()[0]) for process in processes) == [1, 2, 3]


def test_a_run_is_opened_by_its_folder_or_by_an_attempts(tmp_path: Path) -> None:
    start(tmp_path)
    latest = start(tmp_path)
    assert open_run(latest.path) == latest
    assert open_run(str(latest.attempt_path)) == latest
    assert open_run(latest.path / "attempt-1").attempt == 1


def test_opening_what_is_no_run_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path}: no run is there; allowed: a folder of a run"):
        open_run(tmp_path)


def test_a_folder_that_cannot_be_written_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=rf"^runs: {tmp_path}/file is not allowed \(.+\); allowed: a folder to write"):
        start(tmp_path / "file")


def test_writing_leaves_the_old_file_or_the_new_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, None)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
