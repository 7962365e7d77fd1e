"""What happens to each parameter, told before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_lowrank.config import ConfigError
from dist_lowrank.config.schema import AdamWConfig, RunConfig
from dist_lowrank.dictionaries import check_dictionary, check_transform
from dist_lowrank.optim.dense import arithmetic_dtype
from dist_lowrank.sharding.layouts import LayoutError, TallForm, tall_form
from dist_lowrank.strategies import shard_count, shard_dimension
from dist_lowrank.training.model import build_model, low_rank_forms, route
from dist_lowrank.training.optimizers import make_optimizer


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """One parameter: its path, its sharding, and the optimizer state that the fullest rank holds for it."""

    name: str
    shape: tuple[int, ...]
    path: str  # "low-rank" or "dense"
    side: str  # "left" or "right", and the published side where that is another; "" on the dense path
    n: int | None  # length of the compressed axis
    rank: int | None
    placement: str
    state_bytes: int


def parameter_table(config: RunConfig, world_size: int) -> list[ParameterRow]:
    """A row for each trainable parameter, in the model's order; allocates no model.

    Raises:
        ConfigError: what would keep the run from starting: a model that cannot be built, a pattern that matches
            nothing, a dictionary without the size or without the transform.
    """
    _check_transform(config)
    model = build_model(config, meta=True)
    groups = route(model, config.model)
    forms = low_rank_forms(groups, config)
    try:
        shards = shard_count(config.strategy, world_size)
    except LayoutError as error:
        raise ConfigError(str(error)) from error
    rows = []
    specs = {}
    if not isinstance(config.optimizer, AdamWConfig):
        optimizer = make_optimizer(config, groups)
        recipe = optimizer.recipe(optimizer.param_groups[0])  # type: ignore[attr-defined]
        specs = {name: recipe.state(form, arithmetic_dtype(model.get_parameter(name))) for name, form in forms.items()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = tuple(parameter.shape)
        form = forms.get(name)
        if form is None:
            first = math.ceil(shape[0] / shards) if shape else 1
            elements = first * math.prod(shape[1:])
            state_bytes = 2 * elements * arithmetic_dtype(parameter).itemsize + 4
            rows.append(ParameterRow(name, shape, "dense", "", None, None, _placement(config, 0), state_bytes))
            continue
        dimension = _checked_dimension(form, shards, name, config)
        blocks = world_size if config.strategy.name == "ddp" else shards
        fullest = math.ceil(form.rows / blocks)
        state_bytes = 4 + sum(
            spec.columns * spec.dtype.itemsize * (fullest if spec.sharded else 1) for spec in specs[name].values()
        )
        rows.append(
            ParameterRow(
                name, shape, "low-rank", _side(form), form.n, form.rank, _placement(config, dimension), state_bytes
            )
        )
    return rows


def _side(form: TallForm) -> str:
    """With a remark where it is not the published side, the shorter axis: other numbers come out."""
    published = tall_form(form.shape, "shorter", form.rank).side
    return form.side if form.side == published else f"{form.side} (published: {published})"


def _check_transform(config: RunConfig) -> None:
    options = config.optimizer
    if isinstance(options, AdamWConfig):
        return
    try:
        check_transform(options.dictionary, options.transform, options.materialize)
    except ValueError as error:
        raise ConfigError(f"optimizer.{error}") from error


def _checked_dimension(form: TallForm, shards: int, name: str, config: RunConfig) -> int:
    assert not isinstance(config.optimizer, AdamWConfig)
    try:
        check_dictionary(config.optimizer.dictionary, form.n)
    except ValueError as error:
        raise ConfigError(f"optimizer.{error} (parameter {name!r} of shape {form.shape})") from error
    return shard_dimension(form, shards) if shards > 1 else form.rows_axis


def _placement(config: RunConfig, dimension: int) -> str:
    if config.strategy.name == "ddp":
        return "Replicate"
    return f"Shard({dimension})" if config.strategy.name == "fsdp" else f"Replicate, Shard({dimension})"
