"""The command `dist-lowrank`: its verbs, nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from dist_lowrank.compare.verb import add_compare
from dist_lowrank.doctor.verb import add_doctor
from dist_lowrank.exit_codes import ExitCode
from dist_lowrank.launchers.verb import add_launch, start
from dist_lowrank.planning.verb import add_plan
from dist_lowrank.sweep.verb import add_sweep
from dist_lowrank.tables import empty_table
from dist_lowrank.verbs import add_verb

if TYPE_CHECKING:
    from dist_lowrank.training.parameter_table import ParameterRow
    from dist_lowrank.training.traffic_forecast import TrafficRow

_OVERRIDES = """\
overrides (Hydra's grammar; `dist-lowrank check` prints every key):
  optimizer=trion                          an option of a group: model, data, optimizer, strategy, precision,
                                           schedule, launcher, experiment
  optimizer.rank=0.5 train.steps=500       a value
  data=text 'data.path="my books/*.txt"'   your own text; quotes keep spaces together
  resume=none                              a fresh run; or a checkpoint, or a run to start from (docs/checkpoints.md)
  model.pretrained=PATH                    start from a Hugging Face checkpoint
  +model.config.rope_theta=1e5             a field of the transformers configuration

exit codes: 0 done, 1 failed, 2 refused configuration, 3 an assertion does not hold (compare, sweep), 4 unfit (doctor),
5 does not fit into memory (plan, launch), 66 ranks differ, 67 not finite, 69 checkpoint, 75 start again (stopped by
SIGTERM, SIGUSR1 or the time limit), 76 a rank hung, 130 Ctrl-C
"""


def command() -> NoReturn:
    """Entry of the console script: runs one verb and leaves.

    Without the end of Python's interpreter, which takes a second and a half of processor time once torch and
    transformers are loaded; ranks that a signal has hit as they started live until then.
    """
    code = main()
    from dist_lowrank.worker import leave

    leave(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dist-lowrank",
        description="Pre-train language models with low-rank optimizer state, sharded over processes.",
        epilog=_OVERRIDES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for verb, action, summary in (
        ("train", _train, "train on all visible GPUs, or in 2 processes on a CPU"),
        ("resume", _resume, "continue an unfinished run from its newest checkpoint, on other processes if you like"),
        ("check", _check, "print the resolved configuration, the parameters and what a step sends; start nothing"),
    ):
        subparser = add_verb(verbs, verb, action, summary, epilog=_OVERRIDES)
        if verb == "resume":
            # Optional to argparse, which would else ask for overrides in the same breath.
            subparser.add_argument("run", nargs="?", metavar="RUN", help="its folder, such as runs/NAME")
            subparser.usage = "dist-lowrank resume [-h] RUN [OVERRIDE ...]"
        subparser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="such as train.steps=500")
    add_compare(verbs)
    add_sweep(verbs)
    add_launch(verbs)
    add_doctor(verbs)
    add_plan(verbs)
    options, left = parser.parse_known_args(arguments)
    if options.verb is None:
        parser.error(f"a verb is missing; allowed: {', '.join(verbs.choices)}")
    if left and (not hasattr(options, "overrides") or any(each.startswith("-") for each in left)):
        verbs.choices[options.verb].error(f"unrecognized arguments: {' '.join(left)}")
    elif left:  # argparse takes those before an option alone
        options.overrides += left
    try:
        from dist_lowrank.config import ConfigError
    except ModuleNotFoundError as error:
        return _missing(error)
    try:
        code: int = options.action(options)
    except ConfigError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return ExitCode.CONFIGURATION
    except ModuleNotFoundError as error:
        return _missing(error)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    return code


def _train(options: argparse.Namespace) -> int:
    from dist_lowrank.config import create
    from dist_lowrank.launchers.preparation import check_local_run

    config = check_local_run(options.overrides)
    return start(config, create(config, options.overrides))


def _resume(options: argparse.Namespace) -> int:
    from dist_lowrank.config import ConfigError
    from dist_lowrank.launchers.preparation import prepare_resume

    if options.run is None:
        raise ConfigError("resume: the run is missing; allowed: its folder, such as dist-lowrank resume runs/NAME")
    return start(*prepare_resume(options.run, options.overrides))


def _check(options: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from dist_lowrank.config import compose, digest, to_dict

    config = compose(options.overrides)

    from dist_lowrank.launchers.preparation import check_world, planned_processes

    device, processes = planned_processes(config)
    check_world(config, processes)

    from dist_lowrank.training.parameter_table import parameter_table
    from dist_lowrank.training.traffic_forecast import forecast_traffic

    rows = parameter_table(config, processes)
    print(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), end="")
    print(f"\ndigest     {digest(config)}\nprocesses  {processes} on {device}\n")
    _print_parameters(rows)
    print(
        f"\nwhat the optimizer sends, on rank 0 of {processes}\n"
        f"(without what {config.strategy.name} itself sends for gradients and weights)\n"
    )
    _print_traffic(forecast_traffic(config, processes))
    return 0


def _print_traffic(rows: Sequence[TrafficRow]) -> None:
    console, table = empty_table()
    for heading in ("step", "purpose", "operation"):
        table.add_column(heading, no_wrap=True)
    for heading in ("collectives", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.step, row.purpose, row.operation, str(row.collectives), f"{row.bytes:,}")
    console.print(table)
    if any(row.step.endswith("at most") for row in rows):
        print(
            "\nat most: in place of the same without it, where gradients have a lower numerical rank than the subspace"
        )


def _print_parameters(rows: Sequence[ParameterRow]) -> None:
    console, table = empty_table(footer=True)
    table.add_column("parameter", footer=f"{len(rows)} parameters", overflow="fold")
    for heading in ("shape", "path", "side"):
        table.add_column(heading, no_wrap=True)
    for heading in ("n", "rank"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("placement", no_wrap=True)
    total_bytes = sum(row.state_bytes for row in rows)
    table.add_column("state bytes", footer=f"{total_bytes:,}", justify="right", no_wrap=True)
    for row in rows:
        size = ["" if number is None else str(number) for number in (row.n, row.rank)]
        shape = " x ".join(map(str, row.shape))
        table.add_row(row.name, shape, row.path, row.side, *size, row.placement, f"{row.state_bytes:,}")
    console.print(table)


def _missing(error: ModuleNotFoundError) -> int:
    package = (error.name or "").partition(".")[0]
    if package in ("", "dist_lowrank"):
        raise error
    extra = "report" if package == "matplotlib" else "train"
    print(f"error: package {package} is not installed; install dist-lowrank with its extra [{extra}]", file=sys.stderr)
    return ExitCode.FAILED


if __name__ == "__main__":
    command()
