"""`dist-lowrank launch`: what it refuses, and that secrets get into nothing that it writes or says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launch_jobs import CASES

from dist_lowrank.cli import main
from dist_lowrank.config import ConfigError, begin_again, claim, compose, open_run
from dist_lowrank.exit_codes import ExitCode
from dist_lowrank.launchers.preparation import planned_processes

CANARY = "hf_Canary0Canary1Canary2Canary3Canary4"
TEXT = ["data=text", "data.path=text.txt", "data.cache=cache", "data.vocab_size=300"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text.txt").write_text("One and one makes two, says the teacher.\n" * 500)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("One and one makes two, says the teacher.\n" * 500)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _files(folder: Path) -> dict[Path, str]:
    return {path: path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()}


def test_secrets_of_the_environment_are_in_no_file_and_no_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    by_name = 0
    for case, overrides in CASES.items():
        secret = (
            []
            if any("secret_environment" in each for each in overrides)
            else ["launcher.secret_environment=[HF_TOKEN]"]
        )
        command = ["launch", "--render-only", "train.global_batch_size=48", f"name={case}", *overrides, *secret]
        assert main(command) == ExitCode.FINISHED, case
        (launch,) = folder.glob(f"runs/{case}-*/attempt-1/launch")
        texts = "".join(path.read_text() for path in launch.iterdir())
        by_name += "HF_TOKEN" in texts.replace('"secret_environment": [', "")
    assert by_name == len(CASES), "all of them refer to the secret by its name"
    assert not [path for path, text in _files(folder).items() if CANARY in text]
    assert CANARY not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "override",
    [
        f"+hub_token={CANARY}",
        f"launcher.environment.ANYTHING={CANARY}",
        f"launcher.environment.HF_TOKEN='{CANARY}'",
        f"launcher.environment={{ANYTHING: {CANARY}}}",
        f"data.dataset=https://me:{CANARY}@example.org/text",
        f"hf_token={CANARY} and: [more",
        f"launcher.environment={{DB_PASS: x{CANARY[3:]}}}",
        f"launcher.options=[--container-image=me:x{CANARY[3:]}@registry#x]",
    ],
)
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(
    folder: Path, capfd: pytest.CaptureFixture[str], override: str
) -> None:
    before = _files(folder).keys()
    assert main(["launch", "--render-only", "launcher=slurm", *TEXT, override]) == ExitCode.CONFIGURATION
    told = "".join(capfd.readouterr())
    assert CANARY not in told
    assert "credentials are not allowed" in told
    assert _files(folder).keys() == before


FEWER = ["launcher.min_nodes=1", "launcher.nproc_per_node=3"]
REFUSED = {
    "train on a cluster": (
        ["train", "launcher=slurm"],
        "launcher: slurm is not allowed here, where runs start on this machine; allowed: local (or `dist-lowrank la",
    ),
    "nothing to render": (["launch", "--render-only"], "--render-only: is not allowed with launcher=local; allowed: "),
    "a secret that is not there": (
        ["launch", "launcher=docker", "launcher.secret_environment=[NOT_SET_ANYWHERE]"],
        "launcher.secret_environment: NOT_SET_ANYWHERE is not set here; allowed: variables that are set",
    ),
    "a line break in a directive": (
        ["launch", "--render-only", "launcher=slurm", 'runs="r\ntouch x\n#"'],
        "runs: 'r\\ntouch x\\n#' is not allowed with launcher=slurm; allowed: a path without quotes, '\\' and control",
    ),
    "a scheduler that is not here": (
        ["launch", "launcher=slurm"],
        "launcher: slurm is not allowed, sbatch is not on the PATH; allowed: on a machine that has it, or `dist-low",
    ),
    "an engine that is not here": (
        ["launch", "launcher=compose", "launcher.command=[my-engine,compose]"],
        "launcher.command: [my-engine,compose] is not allowed, my-engine is not on the PATH; allowed: on a machine",
    ),
    "a remote shell that is not here": (
        ["launch", "launcher=torchrun", "launcher.remote_shell=[no-ssh]"],
        "launcher.remote_shell: [no-ssh] is not allowed, no-ssh is not on the PATH",
    ),
    "a file that pods do not have": (
        ["launch", "launcher=kubernetes", "launcher.kind=job"],
        "text.txt: is not allowed with launcher=kubernetes, pods do not have it; allowed: paths below /data",
    ),
    "data without a volume for it": (
        ["launch", "--render-only", "launcher=kubernetes", "data.path=/data/text/*.txt"],
        "/data/text: is not allowed with launcher=kubernetes, pods do not have it; allowed: paths below /data (launcher"
        ".data_claim)",
    ),
    "a batch that the processes cannot share": (
        ["launch", "--render-only", "launcher=slurm", "launcher.nodes=3"],
        "train.global_batch_size: 16 is not allowed with 24 processes; allowed: a multiple of 24",
    ),
    "a batch that fewer hosts cannot share": (
        ["launch", "--render-only", "launcher=torchrun", "launcher.hosts=[a,b]", "launcher.rendezvous=c10d", *FEWER],
        "train.global_batch_size: 16 is not allowed with 3 processes",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_started_is_refused_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    arguments, message = REFUSED[what]
    monkeypatch.setenv("PATH", str(folder))
    assert main([arguments[0], *TEXT, *arguments[1:]]) == ExitCode.CONFIGURATION
    assert message in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_text_on_a_volume_of_the_cluster_need_not_be_on_the_machine_that_launches(folder: Path) -> None:
    volume = ["data.path=/data/nowhere/else/*.txt", "data.cache=/runs/cache", "launcher.data_claim=text"]
    assert main(["launch", "--render-only", "launcher=kubernetes", "launcher.device=cpu", *TEXT, *volume]) == 0
    (manifest,) = folder.glob("runs/*/attempt-1/launch/manifest.yaml")
    assert "/data/nowhere/else/*.txt" in manifest.read_text()


def test_slurm_is_not_started_where_its_directives_cannot_name_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ('quo"te', "line\n#SBATCH --x", "back\\slash"):
        (folder / name).mkdir()
        monkeypatch.chdir(folder / name)
        command = ["launch", "--render-only", "launcher=slurm", "launcher.device=cpu"]
        assert main([*command, *TEXT, f"data.path='{folder}/text.txt'"]) == ExitCode.CONFIGURATION
        told = capsys.readouterr().err
        assert told.startswith("error: working directory: ")
        assert "is not allowed with launcher=slurm; allowed: " in told
        assert list((folder / name).iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--render-only"], ["launcher=slurm", "launcher.accelerator=h1000"], ["launcher=slurm"]]
)
def test_what_can_be_told_at_once_is_told_before_torch_is_imported(folder: Path, arguments: list[str]) -> None:
    program = (
        "import sys; from dist_lowrank.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; "
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "launch", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": str(folder)})
    assert ended.returncode == ExitCode.CONFIGURATION, ended.stderr
    assert not (folder / "runs").exists()


def test_an_option_that_does_not_exist_is_answered_with_the_usage_of_the_verb(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["launch", "--bogus"])
    assert capsys.readouterr().err.startswith("usage: dist-lowrank launch [-h] [--render-only]")


def test_a_run_that_does_not_fit_its_accelerator_is_not_launched(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["launch", "--render-only", "launcher=slurm", "launcher.nproc_per_node=2", *TEXT]
    assert main([*command, "launcher.accelerator=1MiB"]) == ExitCode.DOES_NOT_FIT
    assert "does not fit: " in capsys.readouterr().out
    assert main([*command, "launcher.accelerator=h1000"]) == ExitCode.CONFIGURATION
    assert "launcher.accelerator: h1000 is not allowed; did you mean h100? allowed: " in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_a_prepared_attempt_is_claimed_once_and_every_later_start_makes_the_next(folder: Path) -> None:
    command = ["launch", "--render-only", "launcher=torchrun", "launcher.device=cpu", "launcher.nproc_per_node=2"]
    assert main([*command, *TEXT]) == ExitCode.FINISHED
    (run,) = (folder / "runs").iterdir()
    assert [claim(run).attempt for _ in range(3)] == [1, 2, 3]
    begin_again(open_run(run))
    assert claim(run).attempt == 4
    assert open_run(run).config() == open_run(run / "attempt-1").config()


def test_a_script_starts_the_configuration_that_it_was_rendered_with(folder: Path) -> None:
    command = ["launch", "--render-only", "launcher=torchrun", "launcher.device=cpu", *TEXT]
    for settings in (["strategy=ddp", "launcher.nproc_per_node=1"], ["strategy=fsdp", "launcher.nproc_per_node=2"]):
        assert main([*command, *settings]) == ExitCode.FINISHED
    (run,) = (folder / "runs").iterdir()
    for attempt in (1, 2):
        script = (run / f"attempt-{attempt}" / "launch" / "node-0.sh").read_text()
        assert script.endswith(f"    -m dist_lowrank.worker runs/{run.name} --of-attempt {attempt}\n")
    claimed = [claim(run, of_attempt) for of_attempt in (2, 1, 1, 2)]
    assert [each.attempt for each in claimed] == [2, 3, 4, 5], "each start works on the newest attempt"
    assert [each.config().strategy.name for each in claimed] == ["fsdp", "ddp", "ddp", "fsdp"]
    with pytest.raises(ConfigError, match=r"attempt-9: no run is there"):
        claim(run, 9)


def test_submitting_passes_on_the_exit_code_and_says_which_command_does_not_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tools = folder / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text("#!/bin/sh\necho Submitted $1\nexit 7\n")
    (tools / "sbatch").chmod(0o755)
    command = ["launch", "launcher=slurm", "launcher.device=cpu", "launcher.nproc_per_node=2", *TEXT]
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert main(command) == 7
    assert "Submitted " in capfd.readouterr().out
    (tools / "sbatch").write_text("#!/none/sh\n")
    monkeypatch.setenv("PATH", str(tools))
    assert main(command) == ExitCode.FAILED
    assert "error: sbatch: No such file or directory; the files are written" in capfd.readouterr().err


def test_the_batch_of_each_launch_on_the_page_divides_by_its_processes() -> None:
    page = (Path(__file__).parents[1] / "docs" / "launching.md").read_text()
    lines = re.findall(r"^    dist-lowrank launch ((?:.*\\\n)*.*)$", page, re.MULTILINE)
    assert len(lines) >= 9
    for line in lines:
        words = shlex.split(line.replace("\\\n", " "))
        config = compose([word for word in words if word != "--render-only"])
        _, processes = planned_processes(config)
        assert config.train.global_batch_size % processes == 0, line
