"""`launcher=slurm` and `launcher=slurm_pyxis`: an sbatch script that starts a second script on each node."""

from __future__ import annotations

import os
import re
import shlex
from string import Template

from dist_lowrank.config import ConfigError, RunConfig
from dist_lowrank.config.launchers import SlurmLauncher
from dist_lowrank.launchers.job import Job, joined, node_script, rendezvous_options

_BATCH = Template("""\
#!/usr/bin/env bash
# $run on Slurm: sbatch this file from anywhere.
# It continues where an earlier one was stopped. When the run was stopped before its end (exit code 75: the time limit
# comes, or SIGUSR1), the job saves, and requeues itself.
$directives

set -uo pipefail

# srun passes these on to all nodes; each torchrun tells its ranks, which save after the step. One that comes before
# srun is there is noted.
step='' signal='' early=''
trap 'signal=USR1; if [ -n "$$step" ]; then kill -USR1 "$$step"; else early=USR1; fi' USR1
trap 'signal=TERM; if [ -n "$$step" ]; then kill -TERM "$$step"; else early=TERM; fi' TERM

first=$$(scontrol show hostnames "$$SLURM_JOB_NODELIST" | head -n 1)
# The address, because names of nodes need not resolve.
MASTER_ADDR=$$(scontrol show node "$$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
MASTER_PORT=$$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

code=75
if [ -z "$$early" ]; then
    srun $options \\
        bash $script &
    step=$$!
    [ -z "$$early" ] || kill -"$$early" "$$step"

    # A signal ends `wait`, but not the step.
    while :; do
        wait "$$step"
        code=$$?
        kill -0 "$$step" 2>/dev/null || break
    done
    # If it did when the step had just ended, bash still knows how.
    if [ "$$code" -gt 128 ]; then
        wait "$$step"
        again=$$?
        [ "$$again" -eq 127 ] || code=$$again
    fi
fi
echo "$run ended with exit code $$code (docs/faults.md)"

# After scancel the run was stopped too, but the job is no longer one that runs. Where Slurm does not answer, the signal
# tells: scancel sends SIGTERM.
if [ "$$code" -eq 75 ] && [ "$${SLURM_RESTART_COUNT:-0}" -lt $max_requeues ]; then
    state=''
    for _ in 1 2 3 4 5; do
        state=$$(squeue --noheader --jobs "$$SLURM_JOB_ID" --format %T) && [ -n "$$state" ] && break
        sleep 5
    done
    if [ -z "$$state" ] && [ "$$signal" != TERM ]; then
        state=RUNNING
    fi
    if [ "$$state" = RUNNING ]; then
        scontrol requeue "$$SLURM_JOB_ID"
    fi
fi
exit "$$code"
""")


def check_paths(config: RunConfig) -> None:
    """Refuses folders that a line of directives cannot hold.

    Raises:
        ConfigError: naming the folder and what is allowed.
    """
    launcher = config.launcher
    assert isinstance(launcher, SlurmLauncher)
    folders = {"runs": config.runs}
    if launcher.work_directory is None:
        folders["working directory"] = os.getcwd()
    for key, path in folders.items():
        if re.search(r"[\x00-\x1f\x7f'\"\\]", path):
            raise ConfigError(
                f"{key}: {path!r} is not allowed with launcher={launcher.name}; allowed: a path without quotes, '\\' "
                "and control characters"
            )


def render(job: Job[SlurmLauncher]) -> dict[str, str]:
    """`job.sbatch`, and `node.sh` that it starts on each node."""
    launcher = job.launcher
    run = job.run.rpartition("/")[2]
    batch = _BATCH.substitute(
        run=run,
        directives="\n".join(f"#SBATCH {option}" for option in _directives(job)),
        options=" \\\n        ".join(_srun_options(job)),
        script=shlex.quote(joined(job.work_directory, f"{job.folder}/node.sh")),
        max_requeues=launcher.max_requeues,
    )
    node = node_script(
        job,
        f"One node of {run}. job.sbatch starts it on each, with MASTER_ADDR and MASTER_PORT.",
        launcher.python or ("python" if launcher.image else job.python),
        _rendezvous(job),
    )
    return {"job.sbatch": batch, "node.sh": node}


def commands(job: Job[SlurmLauncher]) -> list[list[str]]:
    """Submits it."""
    return [["sbatch", f"{joined(job.work_directory, job.folder)}/job.sbatch"]]


def _directives(job: Job[SlurmLauncher]) -> list[str]:
    launcher = job.launcher
    given = {
        "job-name": job.name,
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "nodes": launcher.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": _cpus(launcher),
        "gpus-per-node": launcher.nproc_per_node if launcher.device == "cuda" else None,
        "mem": None if launcher.memory_gib is None else f"{launcher.memory_gib}G" if launcher.memory_gib else 0,
        "time": launcher.time_limit_minutes,
        "signal": f"B:USR1@{launcher.signal_seconds}",
        "open-mode": "append",
        "chdir": _quoted(job.work_directory),
        "output": _quoted(f"{joined(job.work_directory, job.run).replace('%', '%%')}/slurm-%j.txt"),
        "export": ",".join((*launcher.inherited_environment, *launcher.secret_environment)),
    }
    lines = [f"--{option}={value}" for option, value in given.items() if value is not None]
    return [*lines, "--requeue", *(["--exclusive"] if launcher.exclusive else []), *launcher.options]


def _srun_options(job: Job[SlurmLauncher]) -> list[str]:
    launcher = job.launcher
    options = [f"--export=ALL --kill-on-bad-exit=0 --cpus-per-task={_cpus(launcher)}"]
    if launcher.image is None:
        return options
    mounts = {job.work_directory: job.work_directory, **launcher.mounts}
    listed = ",".join(f"{host}:{inside}" for host, inside in mounts.items())
    passed = ",".join(("MASTER_ADDR", "MASTER_PORT", *launcher.secret_environment))
    return [
        *options,
        f"--container-image={shlex.quote(launcher.image)}",
        f"--container-mounts={shlex.quote(listed)}",
        f"--container-workdir={shlex.quote(job.work_directory)} --no-container-mount-home",
        f"--container-env={passed}",
    ]


def _cpus(launcher: SlurmLauncher) -> int:
    return launcher.cpus_per_task or launcher.threads * launcher.nproc_per_node


def _quoted(path: str) -> str:
    return path if re.fullmatch(r"[\w./%:+=@,-]+", path) else f'"{path}"'


def _rendezvous(job: Job[SlurmLauncher]) -> list[str]:
    launcher = job.launcher
    return rendezvous_options(
        job,
        backend=launcher.rendezvous,
        node_rank='"$SLURM_NODEID"',
        address='"$MASTER_ADDR"',
        port=str(launcher.port or '"$MASTER_PORT"'),
        is_host='"$((SLURM_NODEID == 0))"',
    )
