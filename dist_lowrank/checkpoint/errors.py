"""What can be wrong with a checkpoint, and how all ranks learn of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from dist_lowrank.exit_codes import ExitCode, RunFailure

Result = TypeVar("Result")


class CheckpointError(RunFailure):
    """A checkpoint that cannot be written, read or followed. The text names the file or the key."""

    exit_code = ExitCode.CHECKPOINT


def refused(path: Path, problem: str, allowed: str = "the file as it was saved") -> CheckpointError:
    return CheckpointError(f"{path}: {problem}; allowed: {allowed}")


def together(group: dist.ProcessGroup, work: Callable[[], Result]) -> list[Result]:
    """Does a piece of work on every rank and returns the results of all, by rank. Collective.

    Raises:
        CheckpointError: on every rank, if the work failed on any.
    """
    try:
        own: tuple[Result | None, str | None] = (work(), None)
    except CheckpointError as error:
        own = (None, str(error))
    except Exception as error:
        own = (None, f"{type(error).__name__}: {error}")
    outcomes: list[tuple[Result, str | None]] = [own] * dist.get_world_size(group)  # type: ignore[list-item]
    dist.all_gather_object(outcomes, own, group=group)
    for rank, (_, problem) in enumerate(outcomes):
        if problem is not None:
            raise CheckpointError(f"{problem} (rank {rank})")
    return [result for result, _ in outcomes]
