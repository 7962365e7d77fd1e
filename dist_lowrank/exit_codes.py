"""What the exit code of `dist-lowrank` says: a contract with schedulers and scripts (docs/faults.md)."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Codes never change their meaning. Other codes come from outside, such as 137: the launcher was killed."""

    FINISHED = 0
    FAILED = 1  # an exception, or a rank that died; the same command continues from the newest checkpoint
    CONFIGURATION = 2  # refused; nothing was started
    NOT_HELD = 3  # of `compare` and `sweep`: an assertion does not hold
    UNFIT = 4  # of `doctor`: something failed that training needs
    DOES_NOT_FIT = 5  # of `plan`: a rank needs more memory than the device has
    RANKS_DIFFER = 66  # in configuration, code or versions
    NOT_FINITE = 67  # loss or gradients, too often
    CHECKPOINT = 69  # cannot be read, or is not of this run
    REQUEUE = 75  # stopped by SIGTERM, SIGUSR1 or the time limit; the same command continues
    HANG = 76  # a rank did not answer
    INTERRUPTED = 130  # Ctrl-C
    TERMINATED = 143  # as REQUEUE, but without checkpoints: the same command starts from the beginning


RESTARTED = (ExitCode.FAILED, ExitCode.HANG)  # what another try may cure


class RunFailure(RuntimeError):
    """An end of the run that is explained in full by its text and has an exit code of its own."""

    exit_code = ExitCode.FAILED


class RanksDiffer(RunFailure):
    """Ranks that would not compute the same thing."""

    exit_code = ExitCode.RANKS_DIFFER


class NotFinite(RunFailure):
    """Too many updates were skipped."""

    exit_code = ExitCode.NOT_FINITE


class Hang(RunFailure):
    """A rank did not answer, or got no further."""

    exit_code = ExitCode.HANG
