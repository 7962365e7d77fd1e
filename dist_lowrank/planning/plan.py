"""The plan of a run: what each rank will hold, at which moment the most, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy

from dist_lowrank.config.schema import RunConfig
from dist_lowrank.planning.estimate import StepEstimate, estimate_passes, estimate_step
from dist_lowrank.planning.state import keeps_what_is_faster, optimizer_bytes
from dist_lowrank.planning.trace import Held
from dist_lowrank.planning.weights import start_bytes, strategy_buffers, weight_bytes
from dist_lowrank.telemetry.causes import CAUSES, OF_STEP
from dist_lowrank.training.model import build_model
from dist_lowrank.training.planned_parameters import PlannedParameter, planned_parameters
from dist_lowrank.training.shares import Bytes, Counts


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes on every rank.

    `held` is exact. `step` has of each cause that lives within a step the most at any one moment of it, as estimated;
    the peaks are sums of what is there at one moment.
    """

    world_size: int
    held: Bytes
    step: Mapping[str, int]
    forward_backward_bytes: Counts  # in all, at the peak of the passes
    update_bytes: Counts  # in all, at the peak of the optimizer's step
    start_bytes: int  # in all, when the model is made and spread over the ranks
    micro_batch_size: int
    is_traced: bool  # else what passes and updates hold is missing from peaks
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def peak_bytes(self) -> Counts:
        """Of the three moments."""
        steps = numpy.maximum(self.forward_backward_bytes, self.update_bytes)
        return numpy.maximum(steps, self.start_bytes)

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

    The model is built and the step traced once; forward and backward again for each other micro-batch.
    """

    def __init__(self, config: RunConfig, world_size: int, device_type: str = "cpu", *, traced: bool = True) -> None:
        self.config, self.world_size, self.device_type = config, world_size, device_type
        self.model = build_model(config, meta=True)
        self.parameters = planned_parameters(config, self.model)
        self.weights = weight_bytes(config, self.parameters, world_size)
        self.buffers = strategy_buffers(config, self.parameters, world_size)
        self.start_bytes = start_bytes(config, self.parameters, self.weights)
        self.estimate: StepEstimate | None = estimate_step(config, world_size) if traced else None
        self._passes: dict[int, Held] = {}  # of other micro-batches
        self._state: Bytes | None = None  # of the configuration

    def plan(self, micro_batch_size: int | None = None) -> Plan:
        """Of the configuration, or with another micro-batch, and a global batch that has at least one for each rank."""
        if self._state is None:
            self._state = self._optimizer_bytes(self.config, self.parameters)
        return self._plan(self._state, micro_batch_size)

    def with_rank(self, rank: int | float) -> Plan:
        """With another rank of the subspace. What the arithmetic of the update needs stays as it is."""
        config = replace(self.config, optimizer=replace(self.config.optimizer, rank=rank))  # type: ignore[arg-type]
        return self._plan(self._optimizer_bytes(config, planned_parameters(config, self.model)), None)

    def _optimizer_bytes(self, config: RunConfig, parameters: Sequence[PlannedParameter]) -> Bytes:
        return optimizer_bytes(config, parameters, self.world_size, device_type=self.device_type)

    def _plan(self, state: Bytes, micro_batch_size: int | None) -> Plan:
        nothing = numpy.zeros(self.world_size, dtype=numpy.int64)
        lasting = sum(state.values(), nothing) + sum(
            (count for cause, count in self.weights.items() if cause != "gradients"), nothing
        )
        gradients, size = self.weights["gradients"], micro_batch_size or self.config.train.micro_batch_size
        passes = Held(self.buffers, self.buffers)
        updates, notes = [passes], list[str]()
        if (estimate := self.estimate) is not None:
            size = micro_batch_size or estimate.micro_batch_size
            passes = self._with_buffers(self._passes_of(size, estimate))
            updates = [self._with_buffers(held) for held in (estimate.first, estimate.refresh)]
            notes = list(estimate.notes)
            if 0 < estimate.between_bytes < sum(estimate.refresh.at_peak.values()):
                notes.append(
                    f"an update between refreshes needs {estimate.between_bytes:,} bytes, "
                    f"a refresh {round(sum(estimate.refresh.at_peak.values())):,}; with collective_buffers"
                )
        if keeps_what_is_faster(self.config, self.parameters, self.world_size):
            notes.append(
                "dictionary: at most; where transform=auto finds gemm to be faster, it keeps no fast transform"
            )
        at_peak = dict(passes.at_peak)
        there = at_peak.pop("gradients", 0) if self.config.strategy.zero_stage is None else int(gradients.max())
        return Plan(
            self.world_size,
            {**self.weights, **state},
            {cause: round(max(held.most.get(cause, 0) for held in (passes, *updates))) for cause in OF_STEP},
            lasting + round(sum(at_peak.values())) + numpy.minimum(round(there), gradients),
            lasting + gradients + round(max(sum(held.at_peak.values()) for held in updates)),
            self.start_bytes,
            size,
            self.estimate is not None,
            notes,
        )

    def _passes_of(self, size: int, estimate: StepEstimate) -> Held:
        if size == estimate.micro_batch_size:
            return estimate.passes
        if size not in self._passes:
            batch = max(self.config.train.global_batch_size, size * self.world_size)
            train = replace(self.config.train, micro_batch_size=size, global_batch_size=batch)
            self._passes[size] = estimate_passes(replace(self.config, train=train), self.world_size)
        return self._passes[size]

    def _with_buffers(self, held: Held) -> Held:
        return Held(*(_sum(self.buffers, each) for each in (held.at_peak, held.most)))


def _sum(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {cause: first.get(cause, 0) + second.get(cause, 0) for cause in {*first, *second}}
