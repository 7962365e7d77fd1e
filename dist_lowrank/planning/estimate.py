"""The trace of a step, carried over to all blocks of the model.

What a step holds is linear in the number of blocks, which are alike. So models of three and of four blocks are traced,
unless the whole model has hardly more. In the micro-batch it is not linear: the peak moves from one moment to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_lowrank.config.schema import RunConfig
from dist_lowrank.planning.trace import Bytes, Held, Trace, Updates, depth, trace, with_blocks
from dist_lowrank.training.planned_parameters import planned_parameters
from dist_lowrank.training.shares import shards_of, shares
from dist_lowrank.training.traffic_forecast import TrafficRow

TRACED_SHARDS = 256
WHOLE_BLOCKS = 5  # a model of no more is traced as it is
TRACED_BLOCKS = (3, 4)  # from the third on, blocks wait for the same neighbours


@dataclass(frozen=True, slots=True)
class StepEstimate:
    """What a step holds on one rank beside weights and state, and what the optimizer sends."""

    micro_batch_size: int
    passes: Held  # forward and backward
    first: Held  # the first update
    refresh: Held  # a later one that refreshes
    between_bytes: int  # at the peak of one that does not
    traffic: Sequence[TrafficRow]
    notes: Sequence[str]  # how it was obtained


def estimate_step(config: RunConfig, world_size: int) -> StepEstimate:
    """Traces the step of a run; takes seconds."""
    size, fewer, more, extra = _traces(config, world_size, with_updates=True)
    notes = ["activations: traced on the whole model"]
    if extra:
        blocks = TRACED_BLOCKS[1] + extra
        notes = [f"activations: traced on {TRACED_BLOCKS[0]} and {TRACED_BLOCKS[1]} blocks, carried over to {blocks}"]
    if (shards_of(config, world_size) or 0) > TRACED_SHARDS:
        notes.append(f"gathered_parameters and buffers: traced on {TRACED_SHARDS} ranks, with the padding of all")
    if config.model.compile:
        notes.append("activations: as without model.compile, which usually needs less")
    updates, note = _updates(fewer, more, extra)
    between_bytes = round(sum(updates.between.at_peak.values()))
    return StepEstimate(
        size,
        _further(fewer.passes[size], more.passes[size], extra),
        updates.first,
        updates.refresh,
        between_bytes,
        _traffic(fewer.traffic, more.traffic, extra),
        [*notes, note],
    )


def estimate_passes(config: RunConfig, world_size: int) -> Held:
    """Traces forward and backward alone."""
    size, fewer, more, extra = _traces(config, world_size, with_updates=False)
    return _further(fewer.passes[size], more.passes[size], extra)


def _traces(config: RunConfig, world_size: int, *, with_updates: bool) -> tuple[int, Trace, Trace, int]:
    """The micro-batch, traces of the model cut short, or twice of the whole one, and how many blocks are missing."""
    size = min(config.train.micro_batch_size, config.train.global_batch_size // world_size)
    blocks = depth(config)
    if config.model.attention == "flash_attention_2":  # which keeps what torch's own kernels keep
        config = replace(config, model=replace(config.model, attention="sdpa"))
    if blocks is None or blocks <= WHOLE_BLOCKS:
        whole = _traced(config, world_size, None, size, with_updates)
        return size, whole, whole, 0
    fewer, more = (_traced(config, world_size, count, size, with_updates) for count in TRACED_BLOCKS)
    return size, fewer, more, blocks - TRACED_BLOCKS[1]


def _traced(config: RunConfig, world_size: int, block_count: int | None, size: int, with_updates: bool) -> Trace:
    """FSDP2 cuts what it gathers in a piece per rank: of thousands of ranks, the passes are followed on fewer."""
    if (shards_of(config, world_size) or 0) <= TRACED_SHARDS:
        return trace(config, world_size, block_count, (size,), with_updates=with_updates)
    whole = with_blocks(config, block_count) if block_count is not None else config
    strategy = replace(config.strategy, name="fsdp", shard_size=None)
    batch = config.train.global_batch_size // world_size * TRACED_SHARDS
    near = replace(whole, strategy=strategy, train=replace(config.train, global_batch_size=batch))
    of_layouts = trace(config, world_size, block_count, ())
    passes = trace(near, TRACED_SHARDS, None, (size,), with_updates=False).passes
    shard, near_shard = _stored(whole, world_size), _stored(near, TRACED_SHARDS)
    gathered = shard * (shards_of(config, world_size) or 1) / (near_shard * TRACED_SHARDS)
    factors = {"gradients": shard / near_shard, "gathered_parameters": gathered, "collective_buffers": gathered}
    padded = {
        count: Held(*(_times(each, factors) for each in (held.at_peak, held.most))) for count, held in passes.items()
    }
    return replace(of_layouts, passes=padded)


def _stored(config: RunConfig, world_size: int) -> int:
    """Elements of all weights on one rank, with padding."""
    found = shares(config, planned_parameters(config), world_size)
    return sum(number * int(share.stored[0]) for _, share, number in found)


def _times(held: Bytes, factors: Bytes) -> dict[str, float]:
    return {cause: count * factors.get(cause, 1) for cause, count in held.items()}


def _further(fewer: Held, more: Held, extra: int) -> Held:
    """What grew by one block goes on growing."""
    return Held(
        *(
            {cause: max(0, held + extra * (held - before.get(cause, 0))) for cause, held in after.items()}
            for before, after in ((fewer.at_peak, more.at_peak), (fewer.most, more.most))
        )
    )


def _traffic(fewer: Sequence[TrafficRow], more: Sequence[TrafficRow], extra: int) -> list[TrafficRow]:
    """Bytes grow by block; in how many collectives they go is told only of a model that was traced as it is."""
    before = {(row.step, row.purpose, row.operation): row.bytes for row in fewer}
    rows = []
    for row in more:
        grown = row.bytes - before.get((row.step, row.purpose, row.operation), 0)
        rows.append(replace(row, bytes=row.bytes + extra * grown, collectives=0 if extra else row.collectives))
    return rows


def _updates(fewer: Trace, more: Trace, extra: int) -> tuple[Updates, str]:
    """Of the whole model: no wave of matrices is larger than the workspace setting allows."""
    bound = more.most_update_bytes
    if fewer.updates is None or more.updates is None:
        everything = more.held_update_bytes + extra * (more.held_update_bytes - fewer.held_update_bytes)
        at_most = {"refresh_workspace": min(everything, bound)}
        held = Held(at_most, at_most)
        return Updates(held, held, held), "refresh_workspace: a bound, with its collectives"
    found = [
        _further(before, after, extra)
        for before, after in (
            (fewer.updates.first, more.updates.first),
            (fewer.updates.refresh, more.updates.refresh),
            (fewer.updates.between, more.updates.between),
        )
    ]
    # What dictionaries need while they are made is no part of the bound, but of the trace.
    first = _at_most(found[0], sum(more.updates.first.at_peak.values()) + bound) if extra else found[0]
    later = [_at_most(held, bound) if extra and bound else held for held in found[1:]]
    is_cut = later[0] is not found[1]
    note = "refresh_workspace: what the optimizer's workspace allows" if is_cut else "refresh_workspace: traced"
    return Updates(first, *later), note


def _at_most(held: Held, bound: float) -> Held:
    total = sum(held.at_peak.values())
    if total <= bound:
        return held
    return Held(
        *({cause: count * bound / total for cause, count in each.items()} for each in (held.at_peak, held.most))
    )
