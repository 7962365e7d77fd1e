"""What a step holds beside weights, gradients and state: the step itself, on tensors that have shapes but no data.

The model is sharded as a run's, in a process group that pretends (torch's `fake` backend sends nothing), and its
tensors are fake, so that a step of any rank of any number of ranks runs on a laptop. The tracker that a run uses to
tell its memory (`dist_lowrank.telemetry.memory_tracker`) tells what the step holds.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dist_lowrank.config.optimizers import AdamWConfig, DCTAdamWConfig
from dist_lowrank.config.schema import RunConfig
from dist_lowrank.optim.blocks import Blocks
from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.traffic import jobs_of
from dist_lowrank.optim.transient import held_bytes, scratch_bytes, whole_columns
from dist_lowrank.optim.wave import Job
from dist_lowrank.strategies import apply_strategy, autocast, gradient_sync
from dist_lowrank.telemetry.causes import OF_STEP
from dist_lowrank.telemetry.memory import model_tensors, state_tensors
from dist_lowrank.telemetry.memory_tracker import MemoryTracker
from dist_lowrank.training.evaluate import next_token_loss
from dist_lowrank.training.model import blocks, build_model, low_rank_forms, route
from dist_lowrank.training.optimizers import make_optimizer
from dist_lowrank.training.traffic_forecast import TrafficRow, optimizer_on_flat_tensors, pretended_rank, traffic_of

MOST_PIECES = 8192  # that a rank exchanges with others: beyond, following each takes too long
CPU = torch.device("cpu")
Bytes = Mapping[str, float]  # by cause


@dataclass(frozen=True, slots=True)
class Held:
    """What one rank holds within a part of a step, by cause."""

    at_peak: Bytes  # at the moment at which it holds the most, with the gradients that are there then
    most: Bytes  # of each cause at any one moment


@dataclass(frozen=True, slots=True)
class Updates:
    """What the optimizer's step holds."""

    first: Held  # makes dictionaries
    refresh: Held
    between: Held  # of a step that does not refresh; as `refresh` where all do


@dataclass(frozen=True, slots=True)
class Trace:
    """Of a model of some blocks on one rank, without weights and state."""

    passes: Mapping[int, Held]  # forward and backward, by micro-batch size
    traffic: Sequence[TrafficRow]  # what the optimizer sends
    updates: Updates | None  # None: not followed
    held_update_bytes: int  # if all matrices were updated at once, at most
    most_update_bytes: int  # as the workspace setting bounds it


class _StepsAsNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers code that reads numbers off tensors, of which fake ones have none: counters of steps, and comparisons."""

    step = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else self.step
        return func(*args, **(kwargs or {}))


def trace(
    config: RunConfig,
    world_size: int,
    block_count: int | None,
    micro_batch_sizes: Sequence[int],
    *,
    with_updates: bool = True,
) -> Trace:
    """Follows rank 0 through forward and backward passes and through updates.

    Under DeepSpeed the passes are those of the plain model, without what DeepSpeed itself holds.

    Args:
        block_count: of a model cut short; None: all.
        micro_batch_sizes: to follow through the passes; none: what layouts alone tell.
        with_updates: follow updates too.
    """
    config = config if block_count is None else with_blocks(config, block_count)
    if isinstance(config.optimizer, DCTAdamWConfig):  # other kernels do not run here, and hold no more
        config = replace(config, optimizer=replace(config.optimizer, kernels="torch"))
    with _without_collection(), pretended_rank(0, world_size):
        model = build_model(config, meta=True)
        if config.strategy.name in ("fsdp", "hsdp"):
            forms = low_rank_forms(route(model, config), config)
            apply_strategy(model, blocks(model), config.strategy, config.precision, forms, CPU)
        if not micro_batch_sizes:
            optimizer = _make_optimizer(config, model, "meta")
            return Trace({}, _traffic(config, optimizer), None, *_bounds(optimizer, _jobs(optimizer)))
        numbers = _StepsAsNumbers()  # type: ignore[no-untyped-call]
        with FakeTensorMode(allow_non_fake_inputs=True), numbers:
            model.to_empty(device=CPU)
            passes = {size: _forward_backward(config, model, size, world_size) for size in micro_batch_sizes}
            optimizer = _make_optimizer(config, model, "cpu")
            jobs = _jobs(optimizer)
            bounds, traffic = _bounds(optimizer, jobs), _traffic(config, optimizer)
            takes_turns = any(isinstance(recipe, Blocks) for _, recipe in jobs)
            if not with_updates or takes_turns or sum(map(_pieces, jobs)) > MOST_PIECES:
                return Trace(passes, traffic, None, *bounds)
            return Trace(passes, traffic, _updates(config, model, optimizer, numbers), *bounds)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Garbage in cycles that went in the middle of a step would move its peak, now here, now there."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def with_blocks(config: RunConfig, count: int) -> RunConfig:
    """The same run of a model of another depth."""
    fields = {**config.model.config, _depth_key(config): count}
    return replace(config, model=replace(config.model, config=fields))


def depth(config: RunConfig) -> int | None:
    """Blocks of the model, if they are all alike as far as its configuration tells; None: it cannot be made shorter."""
    key = _depth_key(config)
    value = config.model.config.get(key) if config.model.pretrained is None else None
    return value if isinstance(value, int) else None


def _depth_key(config: RunConfig) -> str:
    return next((key for key in ("num_hidden_layers", "n_layer") if key in config.model.config), "num_hidden_layers")


def _forward_backward(config: RunConfig, model: nn.Module, size: int, world_size: int) -> Held:
    """Of all micro-batches of a step, or of two, if there are more."""
    count = min(2, -(-config.train.global_batch_size // (world_size * size)))
    tracker = MemoryTracker(model, torch.optim.SGD(model.parameters()), lambda: model_tensors(model), CPU)
    with tracker:
        for index in range(count):
            tokens = torch.zeros(size, config.data.sequence_length, dtype=torch.long, device=CPU)
            with autocast(config.strategy, config.precision, CPU):
                loss = next_token_loss(model, tokens)
            with gradient_sync(model, index == count - 1):
                loss.backward()  # type: ignore[no-untyped-call]
            del tokens, loss
    for parameter in model.parameters():
        parameter.grad = None
    memory = tracker.told()
    # DeepSpeed keeps gradients otherwise than this model, which would move the peak.
    at_peak = {"gradients": 0, **memory.most} if config.strategy.zero_stage else memory.at_peak
    return Held({cause: at_peak.get(cause, 0) for cause in ("gradients", *OF_STEP)}, memory.most)


def _updates(
    config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer, numbers: _StepsAsNumbers
) -> Updates:
    interval = getattr(config.optimizer, "refresh_interval", 1)
    first = _update(model, optimizer, numbers, 1)
    # Whether refreshes are at multiples of the interval, or a step later.
    later = [_update(model, optimizer, numbers, step) for step in sorted({interval + 1, 2 * interval})]
    refresh = max(later, key=lambda held: sum(held.at_peak.values()))
    return Updates(first, refresh, _update(model, optimizer, numbers, interval + 2) if interval > 2 else refresh)


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: _StepsAsNumbers, step: int) -> Held:
    numbers.step = step
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    tracker = MemoryTracker(
        model, optimizer, lambda: {"gradients": _gradients(parameters), **state_tensors(optimizer)}, CPU
    )
    if isinstance(optimizer, LowRankOptimizer):
        optimizer.bind()
        optimizer._unchecked, optimizer.verify_every = [], 0  # ranks cannot be compared without data
    with tracker:
        optimizer.step()
    memory = tracker.told()
    causes = ("refresh_workspace", "collective_buffers")
    return Held(*({cause: held[cause] for cause in causes} for held in (memory.at_peak, memory.most)))


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _make_optimizer(config: RunConfig, model: nn.Module, device: str) -> torch.optim.Optimizer:
    """On the sharded model, or on flat tensors as DeepSpeed's."""
    if config.strategy.zero_stage and not isinstance(config.optimizer, AdamWConfig):
        optimizer: Any = optimizer_on_flat_tensors(config, model, device)
    else:
        optimizer = make_optimizer(config, route(model, config))
    if isinstance(optimizer, LowRankOptimizer):
        with _disable_current_modes():  # a mesh of copies is made of tensors that have data
            optimizer._replica_mesh(torch.device(device))
    return cast(torch.optim.Optimizer, optimizer)


def _traffic(config: RunConfig, optimizer: torch.optim.Optimizer) -> list[TrafficRow]:
    return traffic_of(config, optimizer) if isinstance(optimizer, LowRankOptimizer) else []


def _jobs(optimizer: torch.optim.Optimizer) -> list[Job]:
    return jobs_of(optimizer) if isinstance(optimizer, LowRankOptimizer) else []


def _bounds(optimizer: torch.optim.Optimizer, jobs: Sequence[Job]) -> tuple[int, int]:
    """What the arithmetic of matrices needs at most: for all at once, and as the workspace setting cuts it in waves."""
    if not jobs:
        return 0, 0
    assert isinstance(optimizer, LowRankOptimizer)
    held, scratch = [held_bytes(*job) for job in jobs], max(scratch_bytes(*job) for job in jobs)
    return sum(held) + scratch, max(optimizer.workspace_bytes, *held) + scratch


def _pieces(job: Job) -> int:
    """Into how many a matrix is cut to be exchanged."""
    matrix, recipe = job
    delivery = matrix.layout.delivery(recipe.full_rows)
    travels = (
        matrix.layout.exchanges or delivery in ("coefficients", "rows") or whole_columns(recipe, matrix.layout.form)
    )
    return matrix.layout.group_size if travels else 1
