"""`dist-lowrank launch`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from dist_lowrank.exit_codes import ExitCode

if TYPE_CHECKING:
    from dist_lowrank.config import RunConfig, RunFolder

_EPILOG = """\
launchers (docs/launching.md; `dist-lowrank check launcher=NAME` prints every key of one):
  launcher=local         this machine, as `dist-lowrank train`
  launcher=torchrun      several hosts: 'launcher.hosts=[node0,node1]'
  launcher=slurm         sbatch, one torchrun per node; launcher=slurm_pyxis: in a container
  launcher=docker        one container; launcher=compose: several as nodes, for trying out

exit codes: those of `train` where the command waits for the run (local, torchrun, docker, compose); else those of the
command that submits
"""


def add_launch(verbs: argparse._SubParsersAction[Any]) -> None:
    """Adds the verb to the command's parser."""
    summary = "render the files that start a run on a cluster or in containers, and start it"
    parser = verbs.add_parser(
        "launch",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. Everything that can be checked here is checked before.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="such as launcher=slurm launcher.nodes=2")
    parser.add_argument("--render-only", action="store_true", help="write the files, say how to start them, and end")
    parser.set_defaults(action=_launch)


def _launch(options: argparse.Namespace) -> int:
    from dist_lowrank.config import create
    from dist_lowrank.launchers.preparation import check_run

    config = check_run(options.overrides)
    _check_startable(config, options.render_only)
    return start(config, create(config, options.overrides), render_only=options.render_only)


def start(config: RunConfig, folder: RunFolder, *, render_only: bool = False) -> int:
    """Starts an attempt of a run with the launcher of its configuration.

    Args:
        render_only: write the launcher's files and say how to start them.

    Returns:
        The exit code.
    """
    print(folder.announcement, flush=True)
    if config.launcher.name == "local":
        from dist_lowrank.launchers.local import launch

        return launch(config, folder)

    from dist_lowrank.launchers.rendering import by_hand, make_job, write_files
    from dist_lowrank.launchers.submission import submit

    job = make_job(config, folder)
    for path in write_files(job, folder):
        print(f"wrote {path}")
    for line in by_hand(job):
        print(f"{'start it by' if render_only else 'starting'}: {line}", flush=True)
    return ExitCode.FINISHED if render_only else submit(job)


def _check_startable(config: RunConfig, render_only: bool) -> None:
    """Refuses, before anything is written, what could be rendered but not started from here."""
    from dist_lowrank.config import ConfigError

    if config.launcher.name == "local":
        if render_only:
            raise ConfigError("--render-only: is not allowed with launcher=local; allowed: launchers that write files")
        return
    missing = [name for name in config.launcher.secret_environment if not os.environ.get(name)]
    if missing and not render_only:
        raise ConfigError(
            f"launcher.secret_environment: {', '.join(missing)} is not set here; allowed: variables that are set"
        )
