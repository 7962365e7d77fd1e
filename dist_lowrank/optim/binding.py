"""Binding: what an optimizer learns about its parameters, once, when they are final.

Wrappers such as FSDP2 or accelerate replace parameters after an optimizer was built, so nothing is read from them
before the first `step`, `state_dict` or `load_state_dict`, and again if they are not the same later. Every rank creates
all of its state at once, so that keys agree everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dist_lowrank.dictionaries import check_dictionary
from dist_lowrank.optim.dense import DenseParameter, arithmetic_dtype, dense_state
from dist_lowrank.optim.recipe import Recipe
from dist_lowrank.sharding.exchanged import FlatSlice, flat_layout
from dist_lowrank.sharding.layouts import Layout, local, tall_form
from dist_lowrank.sharding.reading import read_layout, sharded_axis
from dist_lowrank.sharding.rounds import ranks_that_differ

_WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(slots=True)
class BoundMatrix:
    """A parameter on the low-rank path."""

    name: str
    parameter: Tensor
    layout: Layout
    dtype: torch.dtype  # of the arithmetic
    captured_energy: Tensor | None = None  # share of the score in the chosen columns, at the last refresh
    previous_indices: Tensor | None = None  # what was chosen before the last refresh; empty if that was the first


@dataclass(slots=True)
class BoundGroup:
    """The parameters of one group, by path."""

    matrices: list[BoundMatrix] = field(default_factory=list)
    dense: list[DenseParameter] = field(default_factory=list)
    fresh_replicas: list[tuple[str, Tensor]] = field(default_factory=list)  # plain, by name, not bound before
    structure: tuple[Any, ...] = ()  # the options that fix the shapes and the meaning of state


def canonical_name(name: str) -> str:
    """The name of a parameter without the prefixes that wrappers add."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name.removeprefix("module.")  # DDP's, also under torch.compile


@dataclass(frozen=True, slots=True)
class FlatPlace:
    """A 1-D parameter is a flat slice of a larger one, of which each rank of a group holds one."""

    slices: tuple[FlatSlice, ...]  # by rank
    group: dist.ProcessGroup

    @property
    def own(self) -> FlatSlice:
        return self.slices[dist.get_rank(self.group)]


def matrix_shape(parameter: Tensor, group: Mapping[str, Any], flat: FlatPlace | None) -> tuple[int, int] | None:
    """Global shape of a parameter on the low-rank path; None on the dense path."""
    shape = tuple(parameter.shape) if flat is None else flat.slices[0].shape
    if len(shape) == 2 and shape[0] * shape[1] > 0 and group["low_rank"]:
        return shape[0], shape[1]
    return None


def is_trained(parameter: Tensor) -> bool:
    """Whether a parameter needs state. Frozen ones do not, unless somebody gives them gradients by hand."""
    return parameter.requires_grad or parameter.grad is not None


def structure_of(recipe: Recipe) -> tuple[Any, ...]:
    return recipe.rank, recipe.side, recipe.dictionary


def bind_group(
    group: Mapping[str, Any],
    first_position: int,
    recipe: Recipe,
    state: MutableMapping[Tensor, dict[str, Tensor]],
    replica_mesh: Callable[[torch.device], DeviceMesh | None],
    flat_places: Mapping[Tensor, FlatPlace],
) -> BoundGroup:
    """Reads layouts and creates the state that is missing.

    Args:
        first_position: of the group's first parameter among all, which names unnamed ones.
        state: of the optimizer, by parameter; what is missing is added.
        replica_mesh: gives the mesh of the ranks that hold copies of plain tensors on a device.
        flat_places: of the parameters that are flat slices.
    """
    bound = BoundGroup(structure=structure_of(recipe))
    parameters = group["params"]
    names = group.get("param_names") or [f"parameter_{first_position + index}" for index in range(len(parameters))]
    for name, parameter in zip(map(canonical_name, names), parameters, strict=True):
        if parameter.is_complex():
            raise ValueError(f"parameter {name!r} is complex, {parameter.dtype}; allowed: real floating-point dtypes")
        if not is_trained(parameter):
            continue
        if parameter.dtype == torch.float16 and recipe.weight_rounding == "stochastic":
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}, which weight_rounding='stochastic' does not round; allowed: "
                "bfloat16 (float32 and float64 need no rounding), or weight_rounding='nearest'"
            )
        flat = flat_places.get(parameter)
        plain = flat is None and not isinstance(parameter, DTensor)
        if plain and not state.get(parameter):
            bound.fresh_replicas.append((name, parameter))
        shape = matrix_shape(parameter, group, flat)
        if shape is None:
            bound.dense.append(DenseParameter(name, parameter, None if flat is None else flat.own.start))
            if not state.get(parameter):
                state[parameter] = dense_state(parameter)
            continue
        form = tall_form(shape, recipe.side, recipe.rank, sharded_axis(parameter))
        try:
            check_dictionary(recipe.dictionary, form.n)
        except ValueError as error:
            raise ValueError(f"parameter {name!r} of shape {form.shape}: {error}") from None
        layout: Layout
        if flat is not None:
            layout = flat_layout(form, flat.slices, dist.get_rank(flat.group), flat.group)
        else:
            layout = read_layout(parameter, form, replica_mesh(parameter.device) if plain else None, name)
        matrix = BoundMatrix(name, parameter, layout, arithmetic_dtype(parameter))
        bound.matrices.append(matrix)
        if not state.get(parameter):
            state[parameter] = _matrix_state(matrix, recipe)
    return bound


def _matrix_state(matrix: BoundMatrix, recipe: Recipe) -> dict[str, Tensor]:
    device = local(matrix.parameter).device
    tensors: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    for key, spec in recipe.state(matrix.layout.form, matrix.dtype).items():
        if spec.sharded:
            tensors[key] = matrix.layout.sharded_state(spec.columns, spec.dtype, device)
        else:
            tensors[key] = torch.zeros(spec.columns, dtype=spec.dtype, device=device)
    return tensors


def check_replicas(parameters: Sequence[tuple[str, Tensor]], group: dist.ProcessGroup) -> None:
    """Refuses plain parameters whose bits do not add up alike on all ranks of the group. Collective.

    Raises:
        ValueError: on every rank, naming the first parameter that differs.
    """
    if not parameters:
        return
    device = parameters[0][1].device
    count = torch.tensor([len(parameters), -len(parameters)], device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=group)
    if count[0] != -count[1]:
        raise ValueError(
            f"the optimizer has {len(parameters)} parameters on this rank and up to {int(count[0])} on others of its "
            "process group; if these ranks hold different models, pass `process_group=` with the replicas of this one"
        )
    sums = torch.stack([_checksum(parameter) for _, parameter in parameters]).to(device)
    extremes = torch.cat([sums, -sums])  # the maximum of -x is minus the minimum of x
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    highest, lowest = extremes.chunk(2)
    differing = (highest != -lowest).nonzero().flatten().tolist()
    if differing:
        raise ValueError(
            f"parameter {parameters[differing[0]][0]!r} ({len(differing)} of {len(parameters)} in all) is not the same "
            "on all ranks of the optimizer's process group. Give all ranks the same weights (DDP does, when it wraps "
            "the model), or pass `process_group=` with the ranks that hold replicas"
        )


def _checksum(parameter: Tensor) -> Tensor:
    """A sum of the bits and a hash of the shape, int64."""
    data = parameter.detach().contiguous()
    integer = {1: torch.uint8, 2: torch.int16}.get(data.element_size(), torch.int32)
    shape = sum((size + 1) * 1_000_003**axis for axis, size in enumerate(parameter.shape)) % 2**31
    return data.flatten().view(integer).sum(dtype=torch.int64).add_(shape)


def check_loaded_shards(matrices: Sequence[BoundMatrix], state: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
    """Refuses shards of state that one rank saved and several loaded. Collective.

    A state dict that rank 0 pickled has rank 0's rows in its DTensors, and they fit everywhere if rows divide evenly.
    Ranks whose rows are the same in every matrix, to the bit, have loaded such a file.

    Raises:
        RuntimeError: on every rank.
    """
    by_group: dict[Any, list[Tensor]] = {}
    for matrix in matrices:
        if matrix.layout.group is not None and matrix.layout.mesh is not None:
            sums = [_checksum(local(t)) for t in state[matrix.parameter].values() if isinstance(t, DTensor)]
            by_group.setdefault(matrix.layout.group, []).extend(sums)
    for group, members in by_group.items():
        if not members:
            continue
        own = torch.stack(members)
        differing = {rank for rank, _ in ranks_that_differ(own, group)}
        same = [rank for rank in range(1, dist.get_world_size(group)) if rank not in differing]
        nonzero = any(bool(local(t).any()) for m in matrices for t in state[m.parameter].values() if local(t).ndim == 2)
        votes = torch.tensor([int(nonzero)], device=own.device)
        dist.all_reduce(votes, group=group)
        if same and int(votes) == dist.get_world_size(group):
            raise RuntimeError(
                f"ranks {[0, *same]} have loaded the same rows of the optimizer's state: one rank saved it, and it is "
                "that rank's part. Save `full_state_dict(optimizer)`, or through torch.distributed.checkpoint"
            )
