"""One run, one folder: named by what it computes, with one sub-folder per attempt.

    runs/llama_tiny-dct_adamw-3f0c62b1a9de/      the run; the digest leaves out what does not change the science
        attempt-1/
            run.json                             the resolved configuration, its digest, the versions
            overrides.txt                        what was typed
            provenance.json                      commit, command, machine
            tensorboard/rank_00000/              event files
            tensorboard/final/                   the line of a finished run in the HParams tab
            traces/                              profiles and memory snapshots, only if asked for or out of memory
            metrics/rank_00000.jsonl             the same numbers as JSON lines
            export/                              the model in Hugging Face format
            errors/rank_00000.txt                only after a failure
            launch/                              what `dist-lowrank launch` rendered
            CLAIMED                              ranks of a rendered job have started on this attempt
            stopped.json                         why, where and with which exit code, if it was asked to stop
        checkpoints/save-0001-step-00000100/     see `dist_lowrank.checkpoint`; attempts continue from the newest
        FINISHED                                 a JSON summary; without it the next start adds attempt-2

The configuration lies in the attempt because attempts of one run may differ in strategy, launcher and telemetry.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

from dist_lowrank.config.errors import ConfigError
from dist_lowrank.config.schema import RunConfig
from dist_lowrank.config.validate import digest, from_dict, to_dict


@dataclass(frozen=True)
class RunFolder:
    """One attempt of one run."""

    path: Path
    attempt: int

    @classmethod
    def of_attempt(cls, path: str | Path) -> RunFolder:
        """From the folder of an attempt, whether it can be seen from here or not."""
        return cls(Path(path).parent, int(Path(path).name.removeprefix("attempt-")))

    @property
    def attempt_path(self) -> Path:
        return self.path / f"attempt-{self.attempt}"

    @property
    def export(self) -> Path:
        return self.attempt_path / "export"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def announcement(self) -> str:
        """The first line that a run prints."""
        return f"run folder {self.attempt_path}   watch it: tensorboard --logdir {shlex.quote(str(self.path))}"

    @property
    def is_finished(self) -> bool:
        return (self.path / "FINISHED").exists()

    def tensorboard(self, rank: int) -> Path:
        return self.attempt_path / "tensorboard" / f"rank_{rank:05d}"

    @property
    def tensorboard_final(self) -> Path:
        return self.attempt_path / "tensorboard" / "final"

    @property
    def traces(self) -> Path:
        return self.attempt_path / "traces"

    @property
    def trace_demand(self) -> Path:
        """Whoever makes this file asks for a profile of the next steps."""
        return self.attempt_path / "TRACE"

    def metrics(self, rank: int) -> Path:
        return self.attempt_path / "metrics" / f"rank_{rank:05d}.jsonl"

    def error(self, rank: int) -> Path:
        return self.attempt_path / "errors" / f"rank_{rank:05d}.txt"

    def config(self) -> RunConfig:
        """The configuration of this attempt."""
        return from_dict(json.loads((self.attempt_path / "run.json").read_text())["config"])

    @property
    def stopped(self) -> dict[str, Any] | None:
        """How this attempt was stopped before the end: `exit_code`, `reason`, `step`; None: it was not."""
        path = self.attempt_path / "stopped.json"
        return json.loads(path.read_text()) if path.exists() else None

    def mark_stopped(self, how: dict[str, Any]) -> None:
        """Notes that this attempt ended in good order before the last step. Call it on one rank."""
        write_atomically(self.attempt_path / "stopped.json", _json(how))

    def mark_finished(self, summary: dict[str, Any]) -> None:
        """Marks the run as complete, so that the same command starts a fresh folder. Call it on one rank."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in summary.items()}
        write_atomically(self.path / "FINISHED", _json({"attempt": self.attempt, **finite}))


def create(config: RunConfig, overrides: Sequence[str], run: Path | None = None) -> RunFolder:
    """Makes the folder of a new attempt: of the unfinished run with the same digest, else of a fresh run.

    With `resume=none` it is a fresh run always. One that starts from another's checkpoint has a digest of its own.

    Commands that start at the same moment get different attempts, because making the attempt's folder is exclusive.

    Args:
        run: the run's folder, if it is known.

    Raises:
        ConfigError: if `runs` cannot be written.
    """
    prefix = config.name or f"{config.model.name}-{config.optimizer.name}"
    base = Path(config.runs) / f"{prefix}-{digest(config)}"
    try:
        for repetition in count(1):
            path = run or (base if repetition == 1 else base.with_name(f"{base.name}-{repetition}"))
            taken = (path / "FINISHED").exists() or (config.resume.source == "none" and path.exists())
            if run is not None or not taken:
                break
        folder = _new_attempt(path)
        folder.tensorboard(0).parent.mkdir()
        folder.metrics(0).parent.mkdir()
        write_atomically(folder.attempt_path / "overrides.txt", "".join(f"{line}\n" for line in overrides))
        write_atomically(folder.attempt_path / "provenance.json", _json(_provenance()))
        record = {"config": to_dict(config), "digest": digest(config), "versions": versions()}
        write_atomically(folder.attempt_path / "run.json", _json(record))
    except OSError as error:
        raise _not_writable(f"runs: {config.runs}", error) from error
    return folder


def begin_again(folder: RunFolder) -> RunFolder:
    """Makes the next attempt of a run that was interrupted, to continue from the run's newest checkpoint.

    Raises:
        ConfigError: the folder cannot be written.
    """
    return create(folder.config(), (folder.attempt_path / "overrides.txt").read_text().splitlines(), folder.path)


def claim(run: str | Path, of_attempt: int | None = None) -> RunFolder:
    """The attempt for ranks that start now: a prepared one, or the next one with the same configuration.

    It is the next one if others have claimed the prepared one, or have prepared another since: who works on the newest
    attempt can be found. So a job that was prepared once can be started again and again, by hand or by a scheduler, as
    it was prepared. Call it on one rank.

    Args:
        run: the run's folder.
        of_attempt: the prepared attempt; None: the newest.

    Raises:
        ConfigError: there is no such attempt, or its folder cannot be written.
    """
    newest = open_run(run)
    folder = newest if of_attempt is None else open_run(newest.path / f"attempt-{of_attempt}")
    try:
        if folder != newest or not _mark_claimed(folder):
            folder = begin_again(folder)
            _mark_claimed(folder)
    except OSError as error:
        raise _not_writable(f"{run}:", error) from error
    return folder


def _not_writable(given: str, error: OSError) -> ConfigError:
    return ConfigError(f"{given} is not allowed ({error.strerror or error}); allowed: a folder to write in")


def _mark_claimed(folder: RunFolder) -> bool:
    """False: someone else has."""
    try:
        (folder.attempt_path / "CLAIMED").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def open_run(path: str | Path) -> RunFolder:
    """The attempt at `path`, or the latest attempt of the run at `path`.

    Raises:
        ConfigError: if there is no run.
    """
    path = Path(path)
    candidates = [path] if path.name.startswith("attempt-") else list(path.glob("attempt-*"))
    attempts = [int(each.name.partition("-")[2]) for each in candidates if (each / "run.json").is_file()]
    if not attempts:
        raise ConfigError(
            f"{path}: no run is there; allowed: a folder of a run, such as runs/NAME or runs/NAME/attempt-1"
        )
    return RunFolder(candidates[0].parent, max(attempts))


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that other processes see whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _new_attempt(path: Path) -> RunFolder:
    path.mkdir(parents=True, exist_ok=True)
    for attempt in count(1):
        folder = RunFolder(path, attempt)
        with contextlib.suppress(FileExistsError):
            folder.attempt_path.mkdir()
            return folder
    raise AssertionError("unreachable")


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that a run computes with, by name; None: not installed."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    packages = ("dist-lowrank", "torch", "transformers", "datasets", "tokenizers", "numpy", "hydra-core", "deepspeed")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def _provenance() -> dict[str, Any]:
    return {
        "command": shlex.join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "hostname": platform.node(),
        "platform": platform.platform(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--porcelain", "--untracked-files=no"),
    }


def _git(*arguments: str) -> str | None:
    """What git says of the repository that this package runs from; None for an installed wheel."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
