"""What happens to each parameter, told before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dist_lowrank.config import ConfigError
from dist_lowrank.config.optimizers import AdamWConfig, Dion3Config
from dist_lowrank.config.schema import RunConfig
from dist_lowrank.optim.dense import arithmetic_dtype, state_dtype
from dist_lowrank.optim.recipe import Recipe
from dist_lowrank.optim.shared_dictionary import role_key, shares_dictionary
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.sharding.exchanged import flat_layout
from dist_lowrank.sharding.layouts import LayoutError, TallForm, tall_form
from dist_lowrank.strategies import shard_count, shard_dimension
from dist_lowrank.training.model import build_model, low_rank_forms, route
from dist_lowrank.training.optimizers import make_optimizer
from dist_lowrank.training.zero_layout import cut_groups


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
    groups = route(model, config)
    forms = low_rank_forms(groups, config)
    specs: dict[str, Mapping[str, StateTensor]] = {}
    dictionaries: dict[str, int] = {}  # bytes of those that matrices share, by the name of the first
    if not isinstance(config.optimizer, AdamWConfig):
        recipes = _recipes(config, groups)
        for name, form in forms.items():
            try:
                recipes[name].check(form)
            except ValueError as error:
                raise ConfigError(f"optimizer.{error} (parameter {name!r} of shape {form.shape})") from error
            specs[name] = recipes[name].state(form, _state_dtype(config, model.get_parameter(name)))
        sharing = {name: form for name, form in forms.items() if shares_dictionary(recipes[name])}
        dictionaries = _dictionary_bytes(model, sharing)
    if config.strategy.zero_stage:
        placed = _under_zero(config, world_size, model, route(model, config), forms, specs)
    else:
        placed = _under_torch(config, world_size, model, forms, specs)
    rows = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = tuple(parameter.shape)
        if name in forms:
            form = forms[name]
            placement, state_bytes = placed[name]
            state_bytes += dictionaries.get(name, 0)
            rank = form.rank if hasattr(config.optimizer, "rank") else None
            path = "matrix" if rank is None else "low-rank"
            rows.append(ParameterRow(name, shape, path, _side(form, config), form.n, rank, placement, state_bytes))
        else:
            rows.append(ParameterRow(name, shape, "dense", "", None, None, *placed[name]))
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


def _dictionary_bytes(model: nn.Module, forms: Mapping[str, TallForm]) -> dict[str, int]:
    """Of shared dictionaries, whole on every rank, with their step counters."""
    first = {role_key(name, None, form.n, form.side): name for name, form in reversed(list(forms.items()))}
    dtypes = {name: arithmetic_dtype(model.get_parameter(name)) for name in first.values()}
    return {name: forms[name].n ** 2 * dtype.itemsize + 4 for name, dtype in dtypes.items()}


def _under_torch(
    config: RunConfig,
    world_size: int,
    model: nn.Module,
    forms: Mapping[str, TallForm],
    specs: Mapping[str, Mapping[str, StateTensor]],
) -> dict[str, tuple[str, int]]:
    """Placement and bytes of state on the fullest rank, by parameter name; each dimension is cut by itself.

    Also of zero0, under which all ranks hold whole copies, as under ddp.
    """
    copies = config.strategy.name in ("ddp", "zero0")
    try:
        shards = 1 if copies else shard_count(config.strategy, world_size)
    except LayoutError as error:
        raise ConfigError(str(error)) from error
    placed = {}
    for name, parameter in model.named_parameters():
        if name not in forms:
            first = math.ceil(parameter.shape[0] / shards) if parameter.ndim else 1
            elements = first * math.prod(parameter.shape[1:])
            placed[name] = _placement(config, 0), _dense_bytes(elements, config, parameter)
        else:
            form = forms[name]
            dimension = shard_dimension(form, shards) if shards > 1 else form.rows_axis
            rows = math.ceil(form.rows / (world_size if copies else shards))
            placed[name] = _placement(config, dimension), _low_rank_bytes(rows, specs[name])
    return placed


def _under_zero(
    config: RunConfig,
    world_size: int,
    model: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    forms: Mapping[str, TallForm],
    specs: Mapping[str, Mapping[str, StateTensor]],
) -> dict[str, tuple[str, int]]:
    """The same under DeepSpeed: on the rank that is the fullest in all, since a rank has much of some matrices."""
    stage = config.strategy.zero_stage
    assert stage
    by_rank: list[dict[str, int]] = [{} for _ in range(world_size)]
    for name, parameter, slices in chain.from_iterable(cut_groups(groups, stage, world_size)):
        for rank, own in enumerate(slices):
            if name in forms:
                layout = flat_layout(forms[name], slices, rank, None)
                by_rank[rank][name] = _low_rank_bytes(layout.stop - layout.start, specs[name])
            else:
                by_rank[rank][name] = _dense_bytes(own.stop - own.start, config, parameter)
    fullest = max(by_rank, key=lambda held: sum(held.values()))
    placement = f"ZeRO-{stage}, {'parameters' if stage == 3 else 'groups'} cut in {world_size}"
    return {name: (placement, held) for name, held in fullest.items()}


def _dense_bytes(elements: int, config: RunConfig, parameter: Tensor) -> int:
    return 2 * elements * _state_dtype(config, parameter).itemsize + 4


def _state_dtype(config: RunConfig, parameter: Tensor) -> torch.dtype:
    """In which state is kept where nothing else is said; torch's AdamW keeps its own in the weights' dtype."""
    is_torchs = isinstance(config.optimizer, AdamWConfig)
    return state_dtype(parameter, "weights" if is_torchs else getattr(config.optimizer, "state_dtype", None))


def _low_rank_bytes(rows: int, specs: Mapping[str, StateTensor]) -> int:
    """Of a matrix of which a rank has the state of this many rows."""
    return 4 + sum(
        spec.columns * spec.dtype.itemsize * (rows if spec.sharded else spec.rows or 1) for spec in specs.values()
    )


def _side(form: TallForm, config: RunConfig) -> str:
    """With a remark where it is not the published side: other numbers come out, but for those that have no subspace."""
    if not hasattr(config.optimizer, "rank"):
        return form.side
    usual = "left" if isinstance(config.optimizer, Dion3Config) else "shorter"
    published = tall_form(form.shape, usual, form.rank).side
    return form.side if form.side == published else f"{form.side} (published: {published})"


def _recipes(config: RunConfig, groups: list[dict[str, Any]]) -> dict[str, Recipe]:
    """By parameter name."""
    try:
        optimizer: Any = make_optimizer(config, groups)
    except ValueError as error:
        raise ConfigError(f"optimizer.{error}") from error
    by_group = [(group["param_names"], optimizer.recipe(group)) for group in optimizer.param_groups]
    return {name: recipe for names, recipe in by_group for name in names}


def _placement(config: RunConfig, dimension: int) -> str:
    if config.strategy.name in ("ddp", "zero0"):
        return "Replicate"
    return f"Shard({dimension})" if config.strategy.name == "fsdp" else f"Replicate, Shard({dimension})"
