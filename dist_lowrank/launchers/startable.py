"""What can be told at once, before torch is imported and anything is written: whether a run can start from here."""

from __future__ import annotations

import os
import shutil

from dist_lowrank.config import ConfigError, RunConfig
from dist_lowrank.config.launchers import KubernetesLauncher, RenderingLauncher


def check_startable(config: RunConfig, *, render_only: bool = False) -> None:
    """Refuses what could be composed, but not rendered or not started from here.

    Args:
        render_only: someone starts the files later, maybe elsewhere.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    launcher = config.launcher
    if not isinstance(launcher, RenderingLauncher):
        if render_only:
            raise ConfigError("--render-only: is not allowed with launcher=local; allowed: launchers that write files")
        return
    if launcher.accelerator is not None:
        from dist_lowrank.planning.devices import capacity_bytes

        capacity_bytes(launcher.accelerator, "launcher.accelerator")
    if isinstance(launcher, KubernetesLauncher):
        _check_paths_in_pods(config, launcher)
    if launcher.name in ("slurm", "slurm_pyxis"):
        from dist_lowrank.launchers.slurm import check_paths

        check_paths(config)
    if render_only:
        return
    missing = [name for name in launcher.secret_environment if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"launcher.secret_environment: {', '.join(missing)} is not set here; allowed: variables that are set"
        )
    key, program = _starter(config)
    if shutil.which(program) is None:
        raise ConfigError(
            f"{key} is not allowed, {program} is not on the PATH; allowed: on a machine that has it, or `dist-lowrank "
            "launch --render-only`, which writes the files and starts nothing"
        )


def _starter(config: RunConfig) -> tuple[str, str]:
    """The setting that decides on the program which starts the run, as `key: value`, and the program."""
    launcher = config.launcher
    for key in ("command", "remote_shell"):
        words = getattr(launcher, key, ())
        if words:
            return f"launcher.{key}: [{','.join(words)}]", words[0]
    return f"launcher: {launcher.name}", "sbatch" if launcher.name.startswith("slurm") else "bash"


def _check_paths_in_pods(config: RunConfig, launcher: KubernetesLauncher) -> None:
    from dist_lowrank.launchers.containers import RUNS, paths_of
    from dist_lowrank.launchers.kubernetes import DATA

    volumes = [RUNS] if launcher.data_claim is None else [RUNS, DATA]
    for path, _ in paths_of(config):
        if not any(path == volume or path.startswith(f"{volume}/") for volume in volumes):
            raise ConfigError(
                f"{path}: is not allowed with launcher=kubernetes, pods do not have it; allowed: paths below {DATA} "
                f"(launcher.data_claim) and {RUNS} (launcher.claim)"
            )
