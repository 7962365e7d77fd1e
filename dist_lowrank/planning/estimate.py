"""The trace of a step, carried over to all blocks of the model and to other micro-batches.

What a step holds is linear in the number of blocks, which are alike, and in the micro-batch. So models of three and
of four blocks are traced, with one micro-batch and with a double one, unless the whole model has hardly more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dist_lowrank.config.schema import RunConfig
from dist_lowrank.planning.trace import Trace, depth, trace
from dist_lowrank.training.traffic_forecast import TrafficRow

WHOLE_BLOCKS = 5  # a model of no more is traced as it is
TRACED_BLOCKS = (3, 4)  # from the third on, blocks wait for the same neighbours


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """Bytes by cause on one rank, beside weights and state."""

    micro_batch_size: int
    forward_backward: Mapping[str, float]  # at the peak of forward and backward, with the gradients of that moment
    per_sample: Mapping[str, float]  # what one more sample adds to it
    update: Mapping[str, float]  # at the peak of the optimizer's step, of one that refreshes
    traffic: Sequence[TrafficRow]  # what the optimizer sends
    notes: Sequence[str]  # how it was obtained

    def passes(self, micro_batch_size: int) -> dict[str, int]:
        """Forward and backward with another micro-batch."""
        more = micro_batch_size - self.micro_batch_size
        return {
            cause: max(0, round(held + more * self.per_sample[cause])) for cause, held in self.forward_backward.items()
        }


def estimate_step(config: RunConfig, world_size: int) -> StepEstimate:
    """Traces the step of a run; takes seconds."""
    size = min(config.train.micro_batch_size, config.train.global_batch_size // world_size)
    sizes, blocks = (size, 2 * size), depth(config)
    if config.model.attention == "flash_attention_2":  # which keeps what torch's own kernels keep
        config = replace(config, model=replace(config.model, attention="sdpa"))
    if blocks is None or blocks <= WHOLE_BLOCKS:
        traces, extra = [trace(config, world_size, None, sizes)] * 2, 0
        notes = ["activations: traced on the whole model"]
    else:
        traces, extra = [trace(config, world_size, count, sizes) for count in TRACED_BLOCKS], blocks - TRACED_BLOCKS[1]
        notes = [f"activations: traced on {TRACED_BLOCKS[0]} and {TRACED_BLOCKS[1]} blocks, carried over to {blocks}"]
    fewer, more = (each.forward_backward for each in traces)
    one, double = (_further(fewer[count], more[count], extra) for count in sizes)
    update, note = _update(traces, extra)
    if config.model.compile:
        notes.append("activations: as without model.compile, which usually needs less")
    per_sample = {cause: (double[cause] - held) / size for cause, held in one.items()}
    return StepEstimate(size, one, per_sample, update, _traffic(traces, extra), [*notes, note])


def _further(fewer: Mapping[str, int], more: Mapping[str, int], extra: int) -> dict[str, float]:
    """What grew by one block goes on growing."""
    return {cause: max(0, held + extra * (held - fewer[cause])) for cause, held in more.items()}


def _traffic(traces: Sequence[Trace], extra: int) -> list[TrafficRow]:
    """Bytes grow by block; in how many collectives they go is told only of a model that was traced as it is."""
    fewer = {(row.step, row.purpose, row.operation): row.bytes for row in traces[0].traffic}
    rows = []
    for row in traces[1].traffic:
        more_bytes = row.bytes - fewer.get((row.step, row.purpose, row.operation), 0)
        rows.append(replace(row, bytes=row.bytes + extra * more_bytes, collectives=0 if extra else row.collectives))
    return rows


def _update(traces: Sequence[Trace], extra: int) -> tuple[dict[str, float], str]:
    fewer, more = traces
    if fewer.update is None or more.update is None:
        everything = more.held_update_bytes + extra * (more.held_update_bytes - fewer.held_update_bytes)
        bound = min(everything, more.most_update_bytes)
        return {"refresh_workspace": bound, "collective_buffers": 0}, "refresh_workspace: a bound, with its collectives"
    found = _further(fewer.update, more.update, extra)
    total = sum(found.values())
    if extra and total > more.most_update_bytes > 0:
        found = {cause: held * more.most_update_bytes / total for cause, held in found.items()}
        return found, "refresh_workspace: what the optimizer's workspace allows"
    return found, "refresh_workspace: traced"
