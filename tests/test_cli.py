"""The command line as a user meets it, in real processes."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lowrank.cli import main
from dist_lowrank.config import ConfigError, compose, digest
from dist_lowrank.launchers.preparation import check_world, resolve_processes

COMMAND = str(Path(sys.executable).with_name("dist-lowrank"))


def run(*arguments: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs the command; also the seconds it takes on a core of its own, which other work here does not stretch."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("arguments", "seconds", "message"),
    [
        (["train", "optimizer.rnak=4"], 5, "error: optimizer.rnak: 4 is not allowed, no such key; did you mean rank? "),
        (["check", "optimizer.rank=1.5"], 5, "error: optimizer.rank: 1.5 is not allowed; allowed: an integer >= 1 "),
        (["train", "data=text", "data.path=/none"], 5, "error: data.path: /none does not exist; allowed: a text file"),
        (
            ["train", "train.global_batch_size=33", "launcher.device=cpu"],
            5,
            "error: train.global_batch_size: 33 is not",
        ),
        (["train", "model.low_rank=[no_such_layer]"], 15, "error: model.low_rank: "),
        (
            ["train", "optimizer.materialize=false"],
            15,
            "error: optimizer.materialize: False is not allowed with transform='gemm', ",
        ),
    ],
)
def test_a_refused_configuration_ends_soon_with_code_2_and_leaves_nothing(
    arguments: list[str], seconds: float, message: str, tmp_path: Path
) -> None:
    result, elapsed = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(message), result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert elapsed < seconds


def test_check_prints_configuration_digest_processes_and_table_and_starts_nothing(tmp_path: Path) -> None:
    result, _ = run("check", "optimizer.rank=0.5", "launcher.device=cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "\n  rank: 0.5\n" in result.stdout
    assert re.search(rf"^digest +{digest(compose(['optimizer.rank=0.5']))}$", result.stdout, re.MULTILINE)
    assert re.search(r"^processes +2 on cpu$", result.stdout, re.MULTILINE)
    assert re.search(r"^parameter +shape +path +side +n +rank +placement +state bytes", result.stdout, re.MULTILINE)
    assert re.search(r"q_proj.* 128 x 128 +low-rank .* 128 +64 ", result.stdout)
    assert "embed_tokens" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_shows_examples_of_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["train", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert "optimizer.rank=0.5 train.steps=500" in capsys.readouterr().out


def test_an_unknown_verb_is_refused_with_the_verbs_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    told = capsys.readouterr().err.replace("'", "")  # some versions of Python quote the verbs
    assert "invalid choice: trian (choose from train, resume, check, " in told


def test_importing_the_command_line_imports_neither_torch_nor_hydra() -> None:
    script = "import sys, dist_lowrank.cli; print([name for name in ('torch', 'hydra', 'rich') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_without_the_train_extra_the_command_says_what_to_install() -> None:
    script = "import sys; sys.modules['hydra'] = None; from dist_lowrank.cli import main; sys.exit(main(['check']))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 1
    assert result.stderr == "error: package hydra is not installed; install dist-lowrank with its extra [train]\n"


def test_processes_default_to_all_gpus_or_two_on_a_cpu() -> None:
    assert resolve_processes(compose(), visible_gpus=8) == ("cuda", 8)
    assert resolve_processes(compose(), visible_gpus=0) == ("cpu", 2)
    assert resolve_processes(compose(["launcher.device=cpu"]), visible_gpus=8) == ("cpu", 2)
    assert resolve_processes(compose(["launcher.nproc_per_node=3"]), visible_gpus=0) == ("cpu", 3)
    assert resolve_processes(compose(["launcher.nproc_per_node=3"]), visible_gpus=8) == ("cuda", 3)


@pytest.mark.parametrize(
    ("overrides", "gpus", "message"),
    [
        (["launcher.nproc_per_node=9"], 1, "launcher.nproc_per_node: 9 ranks but 1 GPU visible; allowed: 1 to 1"),
        (["launcher.nproc_per_node=9"], 4, "launcher.nproc_per_node: 9 ranks but 4 GPUs visible; allowed: 1 to 4"),
        (["launcher.device=cuda"], 0, "launcher.device: cuda is not allowed, no GPU is visible; allowed: auto, cpu"),
    ],
)
def test_more_ranks_than_gpus_are_refused(overrides: list[str], gpus: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_processes(compose(overrides), visible_gpus=gpus)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            ["train.global_batch_size=33"],
            4,
            "train.global_batch_size: 33 is not allowed with 4 processes; allowed: a multiple of 4, such as 32 or 36, "
            "or another launcher.nproc_per_node",
        ),
        (
            ["train.global_batch_size=3"],
            8,
            "train.global_batch_size: 3 is not allowed with 8 processes; allowed: a multiple of 8, such as 8, "
            "or another launcher.nproc_per_node",
        ),
        (
            ["strategy=hsdp", "strategy.shard_size=3"],
            8,
            "strategy.shard_size: 3 is not allowed with 8 processes; allowed: 1, 2, 4, 8",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_sizes_that_do(
    overrides: list[str], world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world(compose(overrides), world_size)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("resume", "error: resume: the run is missing; allowed: its folder, such as dist-lowrank resume runs/NAME\n"),
        (
            "compare",
            "error: compare: the runs are missing; allowed: folders, such as dist-lowrank compare runs/A runs/B\n",
        ),
        ("sweep", "error: sweep: no key has several values; allowed: such as optimizer=adamw,galore or seed=0,1,2\n"),
    ],
)
def test_a_verb_without_what_it_needs_says_what_is_missing(
    verb: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb]) == 2
    assert capsys.readouterr().err == message


def test_a_command_without_a_verb_names_all_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "error: a verb is missing; allowed: train, resume, check, compare, " in capsys.readouterr().err
