"""`dist-lowrank compare`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lowrank.exit_codes import ExitCode
from dist_lowrank.verbs import Verbs, add_verb

if TYPE_CHECKING:
    from dist_lowrank.compare.assertions import Assertion, Outcome
    from dist_lowrank.compare.comparison import Comparison

ASSERTIONS = """\
assertions are about each run (the mean over its seeds) but the first, which is the baseline:
  --assert 'state_bytes.max <= 0.35 * baseline'                    the same quantity of the baseline
  --assert 'abs(loss.validation - baseline.loss.validation) < 0.02 and tokens_per_second >= 0.9 * baseline'
quantities: loss.validation, loss.train, tokens, tokens_per_second, step_milliseconds, training_seconds, refresh_share,
  captured_energy, sent_bytes.mean, sent_bytes.refresh, and over the ranks with .min, .median or .max: state_bytes,
  total_bytes, peak_bytes, memory_bytes.CAUSE, optimizer_milliseconds, optimizer_share
"""

_EPILOG = f"""\
{ASSERTIONS}
exit codes: 0 done, 1 failed, 2 refused, 3 an assertion does not hold
"""


def add_compare(verbs: Verbs) -> None:
    """Adds the verb to the command's parser."""
    summary = "compare runs: loss at equal tokens, memory per rank, speed; check assertions about them"
    parser = add_verb(verbs, "compare", _compare, summary, details=". Prints tables.", epilog=_EPILOG)
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="one or more folders of runs or attempts; the first is the baseline"
    )
    parser.add_argument("--out", metavar="DIR", help="also write Markdown, CSV, JSON, an HTML page and plots there")
    parser.add_argument(
        "--allow", default="", metavar="WHAT", help="may differ: data, seed, model, evaluation, or several: data,seed"
    )
    parser.add_argument("--no-traffic", action="store_true", help="leave out the bytes sent, which take some seconds")
    add_assert(parser)


def add_assert(parser: argparse.ArgumentParser) -> None:
    """The option that several verbs have."""
    parser.add_argument(
        "--assert",
        dest="assertions",
        action="append",
        default=[],
        metavar="EXPR",
        help="exit with code 3 if this does not hold; may be given several times",
    )


def _compare(options: argparse.Namespace) -> int:
    from dist_lowrank.compare.comparison import compare
    from dist_lowrank.compare.plain_text import plain_text
    from dist_lowrank.config import ConfigError

    if not options.runs:
        raise ConfigError("compare: the runs are missing; allowed: folders, such as dist-lowrank compare runs/A runs/B")
    allow = _allowed(options.allow)
    assertions = parse_assertions(options.assertions)
    if options.out:
        require_matplotlib()
    found = compare(options.runs, allow=allow, assertions=assertions, with_traffic=not options.no_traffic)
    print(plain_text(found), end="")
    if options.out:
        write_report(found, Path(options.out))
    return report_outcomes(found.outcomes)


def parse_assertions(texts: Sequence[str]) -> list[Assertion]:
    """All of them, before anything else is done.

    Raises:
        ConfigError: for the first that is not of the language.
    """
    from dist_lowrank.compare.assertions import parse

    return [parse(text) for text in texts]


def require_matplotlib() -> None:
    """Raises ModuleNotFoundError now rather than after the work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")


def write_report(found: Comparison, folder: Path) -> None:
    """Writes all files and says where."""
    from dist_lowrank.compare.write import write

    write(found, folder)
    print(f"\nreport     {folder / 'compare.html'} (beside it: compare.md, compare.csv, compare.json, plots)")


def report_outcomes(outcomes: Sequence[Outcome]) -> int:
    """Names the assertions that do not hold; returns the exit code."""
    for outcome in outcomes:
        if not outcome.holds:
            print(f"error: does not hold for {outcome.label}: {outcome.text} ({outcome.shown})", file=sys.stderr)
    return ExitCode.FINISHED if all(outcome.holds for outcome in outcomes) else ExitCode.NOT_HELD


def _allowed(given: str) -> list[str]:
    from dist_lowrank.compare.groups import COMPARABLE
    from dist_lowrank.config import ConfigError
    from dist_lowrank.config.errors import suggestion

    names = [name for name in given.split(",") if name]
    for name in names:
        if name not in COMPARABLE:
            hint = suggestion(name, COMPARABLE)
            raise ConfigError(f"--allow: {name} is not allowed; {hint}allowed: {', '.join(COMPARABLE)}")
    return names
