"""The folder of a run's checkpoints: names, order, commit, retention.

A checkpoint is written in a folder whose name begins with a dot, and renamed when everything in it is on the disk, so
what has a name is whole. The number in the name counts saves; newest is what was saved last, also after a run was
taken back to an earlier step.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from dist_lowrank.checkpoint.errors import CheckpointError
from dist_lowrank.checkpoint.manifest import MANIFEST, open_checkpoint, verify_files
from dist_lowrank.config.errors import ConfigError

_NAME = re.compile(r"save-(\d{4,})-step-(\d{8,})")


def committed(root: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = list(root.iterdir()) if root.is_dir() else []
    return sorted((p for p in found if _NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()), key=_number)


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint at a path, or those of the run or attempt at that path, newest first.

    Raises:
        ConfigError: nothing of the kind is there.
    """
    if (path / MANIFEST).exists():
        return [path]
    run = path.parent if path.name.startswith("attempt-") else path
    found = committed(run / "checkpoints") or committed(run)
    if not found:
        raise ConfigError(
            f"resume: {path} is not allowed, no checkpoint is there; allowed: auto, none, a checkpoint such as "
            "runs/NAME/checkpoints/save-0001-step-00000100, or a run that has some"
        )
    return found[::-1]


def newest_good(root: Path) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged; reads all of it."""
    for path in reversed(committed(root)):
        try:
            verify_files(open_checkpoint(path))
        except CheckpointError:
            continue
        return path
    return None


def newest_line(root: Path) -> str:
    """What to tell a user whose run has ended early. All that is committed was read back when it was saved."""
    found = committed(root)
    return f"newest good checkpoint {found[-1]}" if found else "no checkpoint was saved"


def begin(root: Path, step: int) -> Path:
    """Makes the folder to write the next checkpoint in, and clears what was left of others that were not finished."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(".save-*"):
        shutil.rmtree(left, ignore_errors=True)
    number = max(map(_number, committed(root)), default=0) + 1
    path = root / f".save-{number:04d}-step-{step:08d}"
    path.mkdir()
    return path


def commit(temporary: Path) -> Path:
    """Gives a checkpoint its name. It survives a crash of the machine from here on."""
    final = temporary.with_name(temporary.name.removeprefix("."))
    _sync(temporary)
    os.rename(temporary, final)
    _sync(final.parent)
    return final


def retire(root: Path, keep_last: int, keep_every_steps: int | None) -> None:
    """Deletes what is older than the last few, but for every n-th step."""
    for path in committed(root)[:-keep_last]:
        step = step_of(path)
        if keep_every_steps is None or step % keep_every_steps:
            doomed = path.with_name(f".{path.name}")  # half deleted, it is no checkpoint
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def step_of(path: Path) -> int:
    """From the name of a committed checkpoint."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[2])


def write_durably(path: Path, text: bytes) -> None:
    with open(path, "xb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _number(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
