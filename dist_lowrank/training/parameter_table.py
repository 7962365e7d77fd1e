"""What happens to each parameter, told before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from dist_lowrank.config.optimizers import Dion3Config
from dist_lowrank.config.schema import RunConfig
from dist_lowrank.optim.dense import arithmetic_dtype
from dist_lowrank.sharding.layouts import TallForm, tall_form
from dist_lowrank.strategies import shard_dimension
from dist_lowrank.training.model import build_model
from dist_lowrank.training.planned_parameters import PlannedParameter, dictionary_keepers, planned_parameters
from dist_lowrank.training.shares import COUNTER_BYTES, Counts, Share, shards_of, share_of_each, tensor_bytes


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """One parameter: its path, its sharding, and the optimizer state that the fullest rank holds for it."""

    name: str
    shape: tuple[int, ...]
    path: str  # "low-rank", "matrix" or "dense"
    side: str  # "left" or "right", and the published side where that is another; "" on the dense path
    n: int | None  # length of the compressed axis
    rank: int | None
    placement: str
    state_bytes: int  # with `blocks`: when it is its turn


def parameter_table(config: RunConfig, world_size: int) -> list[ParameterRow]:
    """A row for each trainable parameter, in the model's order; allocates no model.

    Raises:
        ConfigError: what would keep the run from starting: a model that cannot be built, a pattern that matches
            nothing, a dictionary without the size or without the transform.
    """
    model = build_model(config, meta=True)
    parameters = planned_parameters(config, model)
    held = _bytes_on_fullest_rank(config, parameters, world_size)
    by_name = {each.name: each for each in parameters}
    rows = []
    for name, _ in model.named_parameters():
        if name not in by_name:
            continue  # frozen
        shape, form = by_name[name].shape, by_name[name].form
        placement = _placement(config, form, world_size)
        if form is None:
            rows.append(ParameterRow(name, shape, "dense", "", None, None, placement, held[name]))
        else:
            rank = form.rank if hasattr(config.optimizer, "rank") else None
            path = "matrix" if rank is None else "low-rank"
            rows.append(ParameterRow(name, shape, path, _side(form, config), form.n, rank, placement, held[name]))
    return rows


def as_markdown(rows: Sequence[ParameterRow]) -> str:
    """The table, and the sum of its bytes."""
    lines = [
        "| parameter | shape | path | side | n | rank | placement | state bytes |",
        "|---|---|---|---|--:|--:|---|--:|",
    ]
    for row in rows:
        size = ["" if number is None else str(number) for number in (row.n, row.rank)]
        cells = [f"`{row.name}`", " x ".join(map(str, row.shape)), row.path, row.side, *size, row.placement]
        lines.append(f"| {' | '.join(cells)} | {row.state_bytes:,} |")
    total_bytes = sum(row.state_bytes for row in rows)
    return "\n".join([*lines, f"| {len(rows)} parameters | | | | | | | {total_bytes:,} |"])


def _bytes_on_fullest_rank(
    config: RunConfig, parameters: Sequence[PlannedParameter], world_size: int
) -> dict[str, int]:
    """Of state, by parameter name, on the rank that has the most in all; dictionaries count where they are kept."""
    by_rank = {each.name: _state_bytes(each, share) for each, share in share_of_each(config, parameters, world_size)}
    fullest = int(sum(by_rank.values(), numpy.zeros(world_size, dtype=numpy.int64)).argmax())
    held = {name: int(counts[fullest]) for name, counts in by_rank.items()}
    for each in dictionary_keepers(config, parameters):
        assert each.form is not None
        held[each.name] += each.form.n**2 * arithmetic_dtype(each.tensor).itemsize + COUNTER_BYTES
    return held


def _state_bytes(parameter: PlannedParameter, share: Share) -> Counts:
    if parameter.specs is None:
        return COUNTER_BYTES + 2 * share.elements * parameter.state_dtype.itemsize
    return COUNTER_BYTES + sum((tensor_bytes(spec, share.rows) for spec in parameter.specs.values()), 0 * share.rows)


def _side(form: TallForm, config: RunConfig) -> str:
    """With a remark where it is not the published side: other numbers come out, but for those that have no subspace."""
    if not hasattr(config.optimizer, "rank"):
        return form.side
    usual = "left" if isinstance(config.optimizer, Dion3Config) else "shorter"
    published = tall_form(form.shape, usual, form.rank).side
    return form.side if form.side == published else f"{form.side} (published: {published})"


def _placement(config: RunConfig, form: TallForm | None, world_size: int) -> str:
    stage, shards = config.strategy.zero_stage, shards_of(config, world_size)
    if stage:
        return f"ZeRO-{stage}, {'parameters' if stage == 3 else 'groups'} cut in {world_size}"
    if shards is None:
        return "Replicate"
    dimension = 0 if form is None else shard_dimension(form, shards)
    return f"Shard({dimension})" if config.strategy.name == "fsdp" else f"Replicate, Shard({dimension})"
