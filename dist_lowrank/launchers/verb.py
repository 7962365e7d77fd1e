"""`dist-lowrank launch`: its options, and what it does with them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dist_lowrank.exit_codes import ExitCode
from dist_lowrank.verbs import Verbs, add_verb

if TYPE_CHECKING:
    from dist_lowrank.config import RunConfig, RunFolder

_EPILOG = """\
launchers (docs/launching.md; `dist-lowrank check launcher=NAME` prints every key of one):
  launcher=local         this machine, as `dist-lowrank train`
  launcher=torchrun      several hosts: 'launcher.hosts=[node0,node1]'
  launcher=slurm         sbatch, one torchrun per node; launcher=slurm_pyxis: in a container
  launcher=kubernetes    a TrainJob of Kubeflow; launcher.kind=job: an Indexed Job
  launcher=deepspeed     a hostfile and DeepSpeed's launcher
  launcher=docker        one container; launcher=compose: several as nodes, for trying out

exit codes: those of `train` where the command waits for the run (local, torchrun, docker, compose,
deepspeed); else those of the command that submits; 5: it does not fit launcher.accelerator
"""


_MARGIN = 0.1  # of the accelerator's memory, left for what no plan sees; as `dist-lowrank plan`


def add_launch(verbs: Verbs) -> None:
    """Adds the verb to the command's parser."""
    summary = "render the files that start a run on a cluster or in containers, and start it"
    parser = add_verb(
        verbs,
        "launch",
        _launch,
        summary,
        details=". Everything that can be checked here is checked before.",
        epilog=_EPILOG,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="such as launcher=slurm launcher.nodes=2")
    parser.add_argument(
        "--render-only", action="store_true", help="write the files, say how to start them, and end (not with local)"
    )


def _launch(options: argparse.Namespace) -> int:
    from dist_lowrank.config import compose, create
    from dist_lowrank.launchers.preparation import check_config
    from dist_lowrank.launchers.startable import check_startable

    config = compose(options.overrides)
    check_startable(config, render_only=options.render_only)
    check_config(config)
    if not _fits(config):
        return ExitCode.DOES_NOT_FIT
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


def _fits(config: RunConfig) -> bool:
    """Plans a run for the accelerator that it is for, if that is told, and says what comes out."""
    if config.launcher.name == "local" or config.launcher.accelerator is None:
        return True
    from dist_lowrank.planning.devices import capacity_bytes
    from dist_lowrank.planning.plan import Planner
    from dist_lowrank.planning.report import Report, verdict_line
    from dist_lowrank.planning.verb import verdict_on

    capacity = capacity_bytes(config.launcher.accelerator, "launcher.accelerator")
    planner = Planner(config, config.launcher.world_sizes[0], "cuda")  # on the fewest processes, which hold the most
    verdict = verdict_on(planner, config.launcher.accelerator, capacity, _MARGIN)
    print(verdict_line(Report(config, planner.plan(), verdict, (), ())), flush=True)
    return verdict.fits
