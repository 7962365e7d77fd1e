"""`sweep.json`: how far a sweep is, for people and scripts to read; and the lock that keeps a second one out.

What counts when a sweep starts again is not this file but the mark `FINISHED` in the folders of the runs, which a kill
at any moment leaves right.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from dist_lowrank.config import ConfigError
from dist_lowrank.config.run_folder import write_atomically
from dist_lowrank.sweep.points import Point, Sweep

Status = Literal["waiting", "running", "finished", "failed", "stopped"]


@dataclass
class State:
    """The status of every point; each change is on disk before it takes effect."""

    sweep: Sweep
    statuses: dict[str, Status] = field(default_factory=dict)
    exit_codes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for point in self.sweep.points:
            self.statuses[point.name] = "finished" if point.run else "waiting"
        self._write()

    def set(self, point: Point, status: Status, exit_code: int | None = None) -> None:
        self.statuses[point.name] = status
        if exit_code is not None:
            self.exit_codes[point.name] = exit_code
        self._write()

    def of(self, status: Status) -> list[Point]:
        """The points with a status, in order."""
        return [point for point in self.sweep.points if self.statuses[point.name] == status]

    def _write(self) -> None:
        points = []
        for point in self.sweep.points:
            run = point.run
            points.append(
                {
                    "name": point.name,
                    "status": self.statuses[point.name],
                    "exit_code": self.exit_codes.get(point.name),
                    "folder": str(point.folder),
                    "run": str(run.path) if run else None,
                    "overrides": list(point.overrides),
                }
            )
        write_atomically(self.sweep.folder / "sweep.json", json.dumps({"points": points}, indent=2) + "\n")


@contextmanager
def locked(sweep: Sweep) -> Iterator[None]:
    """Makes the folder and holds its lock, which the system frees however this process ends.

    Raises:
        ConfigError: if the folder cannot be written, or if another process holds the lock.
    """
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        file = (sweep.folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"runs: {sweep.folder} cannot be written ({error.strerror}); allowed: a folder to write in"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"sweep: another process runs {sweep.folder}; allowed: one at a time") from error
        yield
