"""What will happen to each parameter of a run: its path, its rule, and the state that the rule declares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dist_lowrank.config import ConfigError
from dist_lowrank.config.optimizers import AdamWConfig
from dist_lowrank.config.schema import RunConfig
from dist_lowrank.optim.dense import arithmetic_dtype, state_dtype
from dist_lowrank.optim.recipe import Recipe
from dist_lowrank.optim.shared_dictionary import role_key, shares_dictionary
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.training.model import build_model, low_rank_forms, route
from dist_lowrank.training.optimizers import make_optimizer


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """A trainable parameter. On the dense path it has neither form nor recipe."""

    name: str
    tensor: Tensor  # without storage
    group: int  # of the optimizer's parameter groups
    state_dtype: torch.dtype  # of state where nothing else is said
    form: TallForm | None = None
    recipe: Recipe | None = None
    specs: Mapping[str, StateTensor] | None = None  # of its state, beside the step counter

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


def planned_parameters(config: RunConfig, model: nn.Module | None = None) -> list[PlannedParameter]:
    """Every trainable parameter, in the order of the optimizer's groups; allocates no model.

    Args:
        model: of this configuration, without storage and not yet sharded; None: builds one.

    Raises:
        ConfigError: what would keep the run from starting: a model that cannot be built, a pattern that matches
            nothing, a dictionary without the size or without the transform.
    """
    model = build_model(config, meta=True) if model is None else model
    groups = route(model, config)
    forms = low_rank_forms(groups, config)
    recipes = {} if isinstance(config.optimizer, AdamWConfig) else _recipes(config, route(model, config))
    planned = []
    for number, group in enumerate(groups):
        for name, tensor in group["params"]:
            dtype = _state_dtype(config, tensor)
            if name not in forms:
                planned.append(PlannedParameter(name, tensor, number, dtype))
                continue
            form, recipe = forms[name], recipes[name]
            try:
                recipe.check(form)
            except ValueError as error:
                raise ConfigError(f"optimizer.{error} (parameter {name!r} of shape {form.shape})") from error
            planned.append(PlannedParameter(name, tensor, number, dtype, form, recipe, recipe.state(form, dtype)))
    count = sum(each.form is not None for each in planned)
    positions = iter(range(count))
    return [
        each if each.recipe is None else replace(each, recipe=each.recipe.at(next(positions), count))
        for each in planned
    ]


def by_group(parameters: Sequence[PlannedParameter]) -> list[list[PlannedParameter]]:
    """The parameters of each group."""
    return [list(members) for _, members in groupby(parameters, key=lambda each: each.group)]


def dictionary_keepers(config: RunConfig, parameters: Iterable[PlannedParameter]) -> Iterator[PlannedParameter]:
    """The matrices with whose state a shared dictionary is kept: the first of each role."""
    known = set()
    for parameter in parameters:
        form, recipe = parameter.form, parameter.recipe
        if form is None or recipe is None or not shares_dictionary(recipe):
            continue
        # DeepSpeed has a flat tensor for each group, and each has dictionaries of its own.
        flat = parameter.group if config.strategy.zero_stage else None
        key = (*role_key(parameter.name, None, form.n, form.side), arithmetic_dtype(parameter.tensor), flat)
        if key not in known:
            known.add(key)
            yield parameter


def _state_dtype(config: RunConfig, parameter: Tensor) -> torch.dtype:
    """In which state is kept where nothing else is said; torch's AdamW keeps its own in the weights' dtype."""
    is_torchs = isinstance(config.optimizer, AdamWConfig)
    return state_dtype(parameter, "weights" if is_torchs else getattr(config.optimizer, "state_dtype", None))


def _recipes(config: RunConfig, groups: list[dict[str, Any]]) -> dict[str, Recipe]:
    """By parameter name."""
    try:
        optimizer: Any = make_optimizer(config, groups)
    except ValueError as error:
        raise ConfigError(f"optimizer.{error}") from error
    by_group = [(group["param_names"], optimizer.recipe(group)) for group in optimizer.param_groups]
    return {name: recipe for names, recipe in by_group for name in names}
