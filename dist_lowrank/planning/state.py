"""The optimizer's state on each rank, by cause, to the byte: what `memory_bytes` will say after a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy
import torch
from torch import Tensor

from dist_lowrank.config.optimizers import AdamWConfig
from dist_lowrank.config.schema import RunConfig
from dist_lowrank.fast_transforms import FAST_TRANSFORMS, FastTransform
from dist_lowrank.optim.blocks import Blocks
from dist_lowrank.optim.columns import DictionaryColumns
from dist_lowrank.optim.dense import arithmetic_dtype
from dist_lowrank.optim.dion import DionRecipe
from dist_lowrank.optim.grassmann import Grassmann
from dist_lowrank.optim.projections import PowerIteration, RandomizedSvd, Svd, SvdThenRandom
from dist_lowrank.optim.recipe import Recipe
from dist_lowrank.optim.shared_columns import SharedColumns
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.subspaces import index_dtype
from dist_lowrank.training.planned_parameters import PlannedParameter, by_group, dictionary_keepers
from dist_lowrank.training.shares import COUNTER_BYTES, Bytes, Counts, flat_length, shards_of, shares, tensor_bytes


def optimizer_bytes(
    config: RunConfig,
    parameters: Sequence[PlannedParameter],
    world_size: int,
    *,
    device_type: str = "cpu",
    step: int | None = None,
) -> Bytes:
    """By cause, on each rank, as after `step`.

    Args:
        step: decides whose turn it is where matrices take turns (`blocks`). None: the turn in which a rank holds the
            most, of those that come in the run; and the most of diagnostics, which some choices have and others not.
    """
    if isinstance(config.optimizer, AdamWConfig):
        return {"dense_moments": _of_torchs_adamw(config, parameters, world_size)}
    kept: Bytes = {}
    dormant: list[tuple[Blocks, Counts]] = []  # what a matrix needs beside, when it is its turn

    def add(cause: str, count: Counts | int) -> None:
        kept[cause] = kept.get(cause, numpy.zeros(world_size, dtype=numpy.int64)) + count

    for parameter, share, number in shares(config, parameters, world_size):
        add("other_state", number * COUNTER_BYTES)
        if parameter.specs is None:
            add("dense_moments", 2 * number * share.elements * parameter.state_dtype.itemsize)
            continue
        assert parameter.recipe is not None
        assert parameter.form is not None
        add("diagnostics", number * _diagnostics_bytes(parameter.recipe, parameter.form, parameter.tensor, step))
        for spec in parameter.specs.values():
            if spec.dormant:
                assert isinstance(parameter.recipe, Blocks)
                add(spec.cause, number * spec.dtype.itemsize)
                beside = numpy.maximum(tensor_bytes(spec, share.rows) - spec.dtype.itemsize, 0)
                dormant.append((parameter.recipe, number * beside))
            else:
                add(spec.cause, number * tensor_bytes(spec, share.rows))
    if dormant:
        add("moments", _awake(dormant, range(step, step + 1) if step else range(1, config.train.steps + 1)))
    for parameter in dictionary_keepers(config, parameters):
        assert parameter.form is not None
        add("shared_dictionary", parameter.form.n**2 * arithmetic_dtype(parameter.tensor).itemsize)
        add("other_state", COUNTER_BYTES)
    add("dictionary", _dictionary_bytes(parameters, device_type, _repeated(config, world_size)))
    return {cause: count for cause, count in kept.items() if count.any()}


def _diagnostics_bytes(recipe: Recipe, form: TallForm, parameter: Tensor, step: int | None) -> int:
    """What is kept of the last choice to be told: the energy that it captured, and the columns before it."""
    subspace = getattr(recipe, "subspace", None)
    if isinstance(subspace, Svd | RandomizedSvd) or isinstance(recipe, DionRecipe):
        return torch.float64.itemsize
    if isinstance(subspace, SvdThenRandom):  # random directions have nothing to tell
        last = max(each for each in range(1, (step or 1) + 1) if recipe.refreshes(each))
        return torch.float64.itemsize if last < subspace.switch_step else 0
    choices = 2 if step is None else sum(recipe.refreshes(each) for each in range(1, step + 1))
    if isinstance(subspace, PowerIteration | Grassmann):  # whose first choice is an SVD's
        return torch.float64.itemsize if step is None or choices == 1 else 0
    if not isinstance(subspace, DictionaryColumns):
        return 0
    columns = form.rank * index_dtype(form.n).itemsize if choices > 1 else 0
    return arithmetic_dtype(parameter).itemsize + columns


def _awake(dormant: Sequence[tuple[Blocks, Counts]], steps: range) -> Counts:
    """Of matrices whose turn it is, the most in any of the steps."""
    interval = dormant[0][0].interval
    turns = sorted({(step - 1) // interval for step in (*steps[::interval], steps[-1])})
    held = (
        sum((count for recipe, count in dormant if recipe.active(turn * interval + 1)), numpy.zeros_like(dormant[0][1]))
        for turn in turns
    )
    most = numpy.zeros_like(dormant[0][1])
    for count in held:
        most = numpy.maximum(most, count)
    return most


def _repeated(config: RunConfig, world_size: int) -> Callable[[PlannedParameter], bool]:
    """Whether other ranks do the same work on a matrix, so that `auto` must not measure."""
    if config.strategy.zero_stage:  # rows that a cut tears
        return lambda parameter: parameter.form is not None and not parameter.form.transposed and world_size > 1
    shards = shards_of(config, world_size)
    copies = shards is not None and world_size > shards
    return lambda parameter: copies


def _dictionary_bytes(
    parameters: Iterable[PlannedParameter], device_type: str, repeated: Callable[[PlannedParameter], bool]
) -> int:
    """Of fixed dictionaries: one for each set of options, size and dtype, on every rank."""
    sizes: dict[tuple[object, ...], int] = {}
    for parameter in parameters:
        subspace = getattr(parameter.recipe, "subspace", None)
        if parameter.form is None or not isinstance(subspace, DictionaryColumns) or isinstance(subspace, SharedColumns):
            continue
        transform = _transform(subspace, parameter, repeated)
        dtype = arithmetic_dtype(parameter.tensor)
        kept = subspace.operands(dtype)
        key = (subspace.dictionary, parameter.form.n, dtype, kept, subspace.seed, transform, subspace.materialize)
        if key not in sizes:
            sizes[key] = _one_dictionary(subspace, parameter.form.n, kept, transform, device_type)
    return sum(sizes.values())


def keeps_what_is_faster(config: RunConfig, parameters: Iterable[PlannedParameter], world_size: int) -> bool:
    """Whether `transform=auto` measures in the run, so that the plan of dictionaries is an upper bound."""
    repeated = _repeated(config, world_size)
    subspaces = ((parameter, getattr(parameter.recipe, "subspace", None)) for parameter in parameters)
    return any(
        isinstance(subspace, DictionaryColumns)
        and not isinstance(subspace, SharedColumns)
        and subspace.materialize
        and subspace.dictionary in FAST_TRANSFORMS
        and _transform(subspace, parameter, repeated) == "auto"
        for parameter, subspace in subspaces
    )


def _transform(
    subspace: DictionaryColumns, parameter: PlannedParameter, repeated: Callable[[PlannedParameter], bool]
) -> str:
    must_not_measure = subspace.transform == "auto" and subspace.materialize and repeated(parameter)
    return "gemm" if must_not_measure else subspace.transform


def _one_dictionary(subspace: DictionaryColumns, n: int, dtype: torch.dtype, transform: str, device_type: str) -> int:
    """The matrix, or a table; and what a fast transform keeps, also where `auto` may find that it is the slower one."""
    name = subspace.dictionary
    if name == "identity":
        return 0
    numbers = n * n if subspace.materialize else 3 if name == "hadamard" else 4 * n
    size_bytes = numbers * dtype.itemsize
    if name in FAST_TRANSFORMS and transform != "gemm":
        # A CPU may have scipy's, which keeps nothing.
        device = torch.device("cpu" if device_type == "cpu" else "meta")
        twiddle = FastTransform(name, n, dtype=dtype, device=device).twiddle
        size_bytes += 0 if twiddle is None else twiddle.untyped_storage().nbytes()
    return size_bytes


def _of_torchs_adamw(config: RunConfig, parameters: Sequence[PlannedParameter], world_size: int) -> Counts:
    total = numpy.zeros(world_size, dtype=numpy.int64)
    stage = config.strategy.zero_stage
    if stage:  # a flat tensor for each group, with its padding
        for members in by_group(parameters):
            total += 2 * 4 * flat_length(members, stage, world_size) + COUNTER_BYTES
        return total
    for parameter, share, number in shares(config, parameters, world_size):
        itemsize = 4 if stage == 0 else parameter.state_dtype.itemsize
        total += number * (2 * share.elements * itemsize + COUNTER_BYTES)
    return total
