"""`dist-lowrank sweep`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lowrank.compare.verb import (
    ASSERTIONS,
    add_assert,
    parse_assertions,
    report_outcomes,
    require_matplotlib,
    write_report,
)
from dist_lowrank.exit_codes import ExitCode
from dist_lowrank.verbs import Verbs, add_verb

if TYPE_CHECKING:
    from dist_lowrank.compare.assertions import Assertion
    from dist_lowrank.sweep.run import Start
    from dist_lowrank.sweep.state import State

_EPILOG = f"""\
overrides are those of `train`; those with several values span the sweep, the last one varies fastest:
  optimizer=adamw,galore,dct_adamw seed=0,1,2     nine points; the first one's settings are the baseline
  optimizer.rank=0.125,0.25 seed=range(3)         range and choice(a,b,c) of Hydra
The same command goes on where a sweep was stopped or killed: finished points are kept, others continue from their
newest checkpoint, or start again.

{ASSERTIONS}
exit codes: 0 done, 1 a point failed, 2 refused, 3 an assertion does not hold, 75 stopped by SIGTERM or SIGUSR1, or a
point by its time limit; 130 Ctrl-C
"""


def add_sweep(verbs: Verbs) -> None:
    """Adds the verb to the command's parser."""
    summary = "train a grid of runs, one process group per point, and compare them"
    parser = add_verb(
        verbs,
        "sweep",
        _sweep,
        summary,
        details=". Everything is checked before the first point starts.",
        epilog=_EPILOG,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="such as optimizer=adamw,galore seed=0,1,2")
    parser.add_argument(
        "--jobs", default="1", metavar="N", help="points at a time; fit: as many as there are GPUs or cores for"
    )
    add_assert(parser)


def _sweep(options: argparse.Namespace) -> int:
    return sweep(options.overrides, jobs=options.jobs, assertions=parse_assertions(options.assertions))


def sweep(
    overrides: list[str], *, jobs: str = "1", assertions: list[Assertion] | None = None, start: Start | None = None
) -> int:
    """Runs a sweep, or the rest of it, and writes the comparison of its finished points.

    Args:
        overrides: as `points.make_sweep` takes them.
        jobs: as `slots.environments` takes it.
        assertions: about the comparison.
        start: starts one point; None: by `dist-lowrank train`.

    Returns:
        The exit code.

    Raises:
        ConfigError: before anything starts, for what could not run.
    """
    require_matplotlib()

    from dist_lowrank.launchers.preparation import check_local_run
    from dist_lowrank.sweep.points import make_sweep
    from dist_lowrank.sweep.run import run_points, start_point
    from dist_lowrank.sweep.slots import environments
    from dist_lowrank.sweep.state import locked

    made = make_sweep(overrides, check_local_run)
    slots = environments([point.config for point in made.points], jobs)
    with locked(made):
        print(f"sweep folder {made.folder}   {len(made.points)} points, {len(slots)} at a time", flush=True)
        print("what a point prints: points/*/console.txt there", flush=True)
        state, stopped_by = run_points(made, slots, start or start_point)
        if stopped_by:
            print("stopped; the same command goes on from here")
            return ExitCode.INTERRUPTED if stopped_by == signal.SIGINT else ExitCode.REQUEUE
        return _compare(state, made.folder / "comparison", assertions or [])


def _compare(state: State, folder: Path, assertions: list[Assertion]) -> int:
    from dist_lowrank.compare.comparison import compare
    from dist_lowrank.compare.groups import COMPARABLE
    from dist_lowrank.compare.plain_text import plain_text

    failed, stopped, runs = state.of("failed"), state.of("stopped"), [point.run for point in state.of("finished")]
    if not runs:
        print("error: no point finished, there is nothing to compare", file=sys.stderr)
        return ExitCode.FAILED if failed else ExitCode.REQUEUE
    notes = [f"Failed and not in here: {point.name}." for point in failed]
    notes += [f"Not finished and not in here: {point.name}." for point in stopped]
    paths = [str(run.path) for run in runs if run]
    found = compare(paths, allow=COMPARABLE, assertions=assertions, notes=notes)
    print("\n" + plain_text(found), end="")
    write_report(found, folder)
    code = report_outcomes(found.outcomes)
    return ExitCode.FAILED if failed else ExitCode.REQUEUE if stopped else code
