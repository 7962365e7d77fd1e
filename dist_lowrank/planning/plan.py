"""The plan of a run: what each rank will hold, at which moment the most, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy

from dist_lowrank.config.schema import RunConfig
from dist_lowrank.planning.estimate import StepEstimate, estimate_step
from dist_lowrank.planning.parameters import PlannedParameter, planned_parameters
from dist_lowrank.planning.shares import Bytes, Counts
from dist_lowrank.planning.state import optimizer_bytes
from dist_lowrank.planning.weights import strategy_buffers, weight_bytes
from dist_lowrank.telemetry.causes import CAUSES, OF_STEP


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes on every rank.

    `held` is exact. `step` has of each cause that lives within a step the most that is estimated at its two peaks; the
    two peaks are sums of what is there at that moment.
    """

    world_size: int
    held: Bytes
    step: Mapping[str, int]
    forward_backward_bytes: Counts  # in all, at the peak of the passes
    update_bytes: Counts  # in all, at the peak of the optimizer's step
    micro_batch_size: int
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def peak_bytes(self) -> Counts:
        return numpy.maximum(self.forward_backward_bytes, self.update_bytes)

    @property
    def worst_rank(self) -> int:
        """The first of those that hold the most."""
        return int(self.peak_bytes.argmax())

    def by_cause(self) -> Bytes:
        """All causes: `held`, then `step`, which is the same on all ranks."""
        ranks = numpy.ones(self.world_size, dtype=numpy.int64)
        found = {**self.held, **{cause: count * ranks for cause, count in self.step.items() if count}}
        return {cause: found[cause] for cause in CAUSES if cause in found}


class Planner:
    """Plans of one model on one number of ranks, for different ranks of the subspace and micro-batches.

    The model is built and the step traced once.
    """

    def __init__(self, config: RunConfig, world_size: int, device_type: str = "cpu", *, traced: bool = True) -> None:
        self.config, self.world_size, self.device_type = config, world_size, device_type
        self.parameters = planned_parameters(config)
        self.weights = weight_bytes(config, self.parameters, world_size)
        self.buffers = strategy_buffers(config, self.parameters, world_size)
        self.estimate: StepEstimate | None = estimate_step(config, world_size) if traced else None

    def plan(self, micro_batch_size: int | None = None) -> Plan:
        """Of the configuration, or with another micro-batch."""
        return self._plan(self.config, self.parameters, micro_batch_size)

    def with_rank(self, rank: int | float) -> Plan:
        """With another rank of the subspace. What the arithmetic of the update needs stays as it is."""
        config = replace(self.config, optimizer=replace(self.config.optimizer, rank=rank))  # type: ignore[arg-type]
        return self._plan(config, planned_parameters(config), None)

    def _plan(self, config: RunConfig, parameters: Sequence[PlannedParameter], micro_batch_size: int | None) -> Plan:
        state = optimizer_bytes(config, parameters, self.world_size, device_type=self.device_type)
        nothing = numpy.zeros(self.world_size, dtype=numpy.int64)
        lasting = sum(state.values(), nothing) + sum(
            (count for cause, count in self.weights.items() if cause != "gradients"), nothing
        )
        passes, update, size, notes = (
            dict(self.buffers),
            dict(self.buffers),
            config.train.micro_batch_size,
            ["not traced"],
        )
        if self.estimate is not None:
            size, notes = micro_batch_size or self.estimate.micro_batch_size, list(self.estimate.notes)
            passes = _sum(self.buffers, self.estimate.passes(size))
            update = _sum(self.buffers, {cause: round(held) for cause, held in self.estimate.update.items()})
        gradients = self.weights["gradients"]
        within = passes.pop("gradients", 0) if not config.strategy.zero_stage else int(gradients.max())
        return Plan(
            self.world_size,
            {**self.weights, **state},
            {cause: max(passes.get(cause, 0), update.get(cause, 0)) for cause in OF_STEP},
            lasting + sum(passes.values()) + numpy.minimum(within, gradients),
            lasting + gradients + sum(update.values()),
            size,
            notes,
        )


def _sum(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {cause: first.get(cause, 0) + second.get(cause, 0) for cause in {*first, *second}}
