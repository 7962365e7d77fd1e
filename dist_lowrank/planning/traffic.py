"""What a strategy itself sends in a step, for gradients and weights: closed forms."""

from __future__ import annotations

from collections.abc import Sequence

from dist_lowrank.config.schema import RunConfig
from dist_lowrank.optim.columns import PreviousColumns
from dist_lowrank.optim.low_rank import LowRank
from dist_lowrank.training.planned_parameters import PlannedParameter, by_group
from dist_lowrank.training.shares import flat_length, shards_of, shares
from dist_lowrank.training.traffic_forecast import TrafficRow


def strategy_traffic(config: RunConfig, parameters: Sequence[PlannedParameter], world_size: int) -> list[TrafficRow]:
    """What rank 0 hands over to collectives for the model in each step; under DeepSpeed as its own defaults do.

    Bytes are those of the tensors that are handed over: of a gather this rank's part, of a reduction all that it sums,
    each once, however often a ring or tree then passes it on.

    Not counted are the gradient's norm and the loss, a few bytes.
    """
    if world_size == 1:
        return []
    if config.strategy.low_rank_gradients:
        return _coefficients(config, parameters)
    stage, shards = config.strategy.zero_stage, shards_of(config, world_size)
    passes = -(-config.train.global_batch_size // (world_size * config.train.micro_batch_size))
    if stage == 0 or (shards is None and stage is None):
        size_bytes = sum(each.tensor.numel() * _gradient_bytes(config, each) for each in parameters)
        return [_row("gradients", "all_reduce", size_bytes)]
    if stage:
        own = sum(flat_length(members, stage, world_size) for members in by_group(parameters))
        low = 2 if config.precision.name == "bf16" else 4
        gradients = own * world_size * (4 if config.precision.name == "bf16" else low)
        rows = [_row("gradients", "all_reduce" if stage == 1 else "reduce_scatter", gradients)]
        return [*rows, _row("weights", "all_gather", own * low * (2 * passes if stage == 3 else 1))]
    assert shards is not None
    stored = [(each, int(share.stored[0]) * number) for each, share, number in shares(config, parameters, world_size)]
    gathers = passes * (2 if config.strategy.reshard_after_forward else 1)
    half = config.precision.name in ("bf16", "bf16_weights")
    weights = sum(count * (2 if half else each.tensor.element_size()) for each, count in stored)
    reduced = sum(count * (4 if half else each.tensor.element_size()) for each, count in stored)
    rows = []
    if shards > 1:
        rows += [
            _row("weights", "all_gather", gathers * weights),
            _row("gradients", "reduce_scatter", shards * reduced),
        ]
    if world_size > shards:
        rows.append(_row("gradients", "all_reduce", reduced))
    return rows


def _coefficients(config: RunConfig, parameters: Sequence[PlannedParameter]) -> list[TrafficRow]:
    """What `dist_lowrank.optim.gradient_sync` sums, after the first step, at which all gradients are summed whole."""
    interval: int = getattr(config.optimizer, "refresh_interval", 1)
    sizes = [
        sum(_summed_elements(each, step) * each.tensor.element_size() for each in parameters)
        for step in range(2, interval + 2)
    ]
    if min(sizes) == max(sizes):
        return [_row("gradients", "all_reduce", sizes[0])]
    of_steps = (("refresh", max(sizes)), ("between refreshes", min(sizes)))
    return [TrafficRow(step, "gradients", "all_reduce", 0, size_bytes) for step, size_bytes in of_steps]


def _summed_elements(parameter: PlannedParameter, step: int) -> int:
    """L x r coefficients where the step's directions are known beforehand, and n scores where it chooses the next."""
    form, recipe = parameter.form, parameter.recipe
    if form is None or not isinstance(recipe, LowRank):
        return parameter.tensor.numel()
    if isinstance(recipe.subspace, PreviousColumns):
        return form.rows * form.rank + form.n
    return parameter.tensor.numel() if recipe.refreshes(step) else form.rows * form.rank


def _gradient_bytes(config: RunConfig, parameter: PlannedParameter) -> int:
    return 2 if config.strategy.zero_stage == 0 and config.precision.name == "bf16" else parameter.tensor.element_size()


def _row(purpose: str, operation: str, size_bytes: int) -> TrafficRow:
    return TrafficRow("every step", purpose, operation, 0, size_bytes)
