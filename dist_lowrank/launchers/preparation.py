"""What must hold before any process of a run starts: enough GPUs, sizes that divide, patterns that match, a folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from dist_lowrank.config import ConfigError, RunConfig, RunFolder, compose, create, digest, open_run
from dist_lowrank.config.deepspeed_json import deepspeed_json
from dist_lowrank.config.optimizers import DCTAdamWConfig
from dist_lowrank.config.schema import TextData
from dist_lowrank.launchers.startable import check_startable
from dist_lowrank.training.data import check_data


def prepare_run(overrides: Sequence[str], world_size: int | None = None) -> tuple[RunConfig, RunFolder]:
    """Composes, checks and makes the folder of a run; starts nothing. As `check_run`, which says more."""
    config = check_run(overrides, world_size)
    return config, create(config, overrides)


def check_run(overrides: Sequence[str], world_size: int | None = None) -> RunConfig:
    """Composes and checks; writes and starts nothing.

    Args:
        overrides: Hydra overrides.
        world_size: processes that someone else (torchrun) has started; None: as many as `resolve_processes` says.

    Raises:
        ConfigError: if the run could not work.
    """
    config = compose(overrides)
    check_config(config, world_size)
    return config


def check_local_run(overrides: Sequence[str]) -> RunConfig:
    """As `check_run`, for a run that this command itself is to start on this machine.

    Raises:
        ConfigError: if the run could not work, or has another launcher.
    """
    config = check_run(overrides)
    if config.launcher.name != "local":
        raise ConfigError(
            f"launcher: {config.launcher.name} is not allowed here, where runs start on this machine; allowed: local "
            "(or `dist-lowrank launch` with the same overrides)"
        )
    return config


def prepare_resume(run: str, overrides: Sequence[str]) -> tuple[RunConfig, RunFolder]:
    """As `prepare_run`, for a new attempt of an unfinished run, configured as its last attempt was.

    Args:
        run: its folder, or one of its attempts.
        overrides: further ones, that change how it runs but not what it computes.

    Raises:
        ConfigError: if it could not work; then nothing was written.
    """
    last = open_run(run)
    if last.is_finished:
        raise ConfigError(f"{run}: is finished; allowed: an unfinished run (or `dist-lowrank train ... resume={run}`)")
    before = (last.attempt_path / "overrides.txt").read_text().splitlines()
    kept = _without(before, overrides)
    config = compose([*kept, *overrides])
    wanted = digest(last.config())
    if digest(config) != wanted:
        at_fault = [each for each in overrides if digest(compose([*_without(before, [each]), each])) != wanted]
        raise ConfigError(
            f"{' '.join(at_fault or overrides)}: is not allowed, it changes what {last.path} computes; allowed: what "
            f"does not, such as strategy, launcher.nproc_per_node, telemetry (or `dist-lowrank train ... resume={run}`)"
        )
    check_startable(config)
    check_config(config)
    return config, create(config, [*kept, *overrides], last.path)


def _without(before: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Earlier overrides, but for keys that are given anew."""
    given = {each.partition("=")[0].lstrip("+") for each in overrides}
    return [each for each in before if each.partition("=")[0].lstrip("+") not in given]


def check_config(config: RunConfig, world_size: int | None = None) -> None:
    """As `check_run`, for a run that has been composed."""
    sizes = (world_size,) if world_size else config.launcher.world_sizes or (resolve_processes(config)[1],)
    for size in sizes:
        check_world(config, size)
    if not config.launcher.world_sizes:  # else processes start elsewhere
        _check_kernels(config)
    if not (isinstance(config.data, TextData) and config.launcher.name == "kubernetes"):  # pods look for themselves
        try:
            check_data(config.data)
        except (ValueError, ConnectionError) as error:
            raise ConfigError(str(error)) from error

    from dist_lowrank.training.parameter_table import parameter_table  # slow: imports transformers

    parameter_table(config, sizes[-1])  # for its checks: names match, layouts are supported
    if config.resume.starts_elsewhere:
        _check_source(config)


def _check_kernels(config: RunConfig) -> None:
    if not isinstance(config.optimizer, DCTAdamWConfig) or config.optimizer.kernels == "torch":
        return
    from dist_lowrank.optim.triton_columns import check_device

    try:
        check_device(resolve_processes(config)[0], config.optimizer.transform_precision)
    except ValueError as error:
        raise ConfigError(f"optimizer.{error}") from error


def _check_source(config: RunConfig) -> None:
    from dist_lowrank.checkpoint.errors import CheckpointError
    from dist_lowrank.checkpoint.folders import checkpoints_at
    from dist_lowrank.checkpoint.manifest import open_checkpoint
    from dist_lowrank.checkpoint.restore import check_can_follow

    newest = checkpoints_at(Path(config.resume.source))[0]
    if not config.resume.weights_only:
        try:
            check_can_follow(open_checkpoint(newest), config)
        except CheckpointError as error:
            if not config.resume.fallback:
                raise ConfigError(f"resume: {error}") from error


def planned_processes(config: RunConfig) -> tuple[str, int]:
    """The device type and the number of processes of all nodes, wherever the launcher starts them.

    Raises:
        ConfigError: as `resolve_processes`, for this machine.
    """
    sizes = config.launcher.world_sizes
    return (config.launcher.device, sizes[-1]) if sizes else resolve_processes(config)


def resolve_processes(config: RunConfig, visible_gpus: int | None = None) -> tuple[str, int]:
    """The device type, "cpu" or "cuda", and the number of processes on this machine.

    Args:
        config: its `launcher` section decides.
        visible_gpus: None: ask the driver.

    Raises:
        ConfigError: if the GPUs asked for are not there.
    """
    import torch  # here, so that what `compose` refuses is told without this second

    launcher = config.launcher
    gpus = torch.cuda.device_count() if visible_gpus is None else visible_gpus
    if launcher.device == "cuda" and gpus == 0:
        raise ConfigError("launcher.device: cuda is not allowed, no GPU is visible; allowed: auto, cpu")
    if launcher.device == "cpu" or gpus == 0:
        return "cpu", launcher.nproc_per_node or 2
    processes = launcher.nproc_per_node or gpus
    if processes > gpus:
        raise ConfigError(
            f"launcher.nproc_per_node: {processes} ranks but {gpus} GPU{'s' if gpus > 1 else ''} visible; "
            f"allowed: 1 to {gpus} (or launcher.device=cpu)"
        )
    return "cuda", processes


def check_world(config: RunConfig, world_size: int) -> None:
    """Refuses what does not fit the number of processes, or is not installed.

    Raises:
        ConfigError: naming the key, its value and values near it that would do.
    """
    check_sizes(config, world_size)
    if config.strategy.zero_stage is not None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(
                f"strategy: {config.strategy.name} is not allowed, package deepspeed is not installed; allowed: fsdp, "
                "hsdp, ddp (or install dist-lowrank with its extra [deepspeed])"
            )
        deepspeed_json(config, world_size)  # for its checks


def check_sizes(config: RunConfig, world_size: int, given_by: str = "launcher.nproc_per_node") -> None:
    """Refuses sizes that do not fit the number of processes.

    Args:
        given_by: the key or option that says how many they are.

    Raises:
        ConfigError: naming the key, its value and values near it that would do.
    """
    batch, shard = config.train.global_batch_size, config.strategy.shard_size
    if batch % world_size:
        below = batch // world_size * world_size
        nearby = f"{below} or {below + world_size}" if below else f"{world_size}"
        raise ConfigError(
            f"train.global_batch_size: {batch} is not allowed with {world_size} processes; "
            f"allowed: a multiple of {world_size}, such as {nearby}, or another {given_by}"
        )
    if shard is not None and world_size % shard:
        divisors = [str(size) for size in range(1, world_size + 1) if world_size % size == 0]
        raise ConfigError(
            f"strategy.shard_size: {shard} is not allowed with {world_size} processes; allowed: {', '.join(divisors)}"
        )
