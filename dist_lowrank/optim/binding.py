"""Binding: what an optimizer learns about its parameters, once, when they are final.

Wrappers such as FSDP2 or accelerate replace parameters after an optimizer was built, so nothing is read from them
before the first `step`, `state_dict` or `load_state_dict`. Then every rank creates all of its state, so that keys
agree everywhere.
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
from dist_lowrank.optim.dense import arithmetic_dtype, dense_state
from dist_lowrank.optim.recipe import Recipe
from dist_lowrank.sharding.layouts import RowLayout, local, row_layout, tall_form

_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(slots=True)
class BoundMatrix:
    """A parameter on the low-rank path."""

    name: str
    parameter: Tensor
    layout: RowLayout
    dtype: torch.dtype  # of the arithmetic
    captured_energy: Tensor | None = None  # share of the score in the chosen columns, at the last refresh

    def transient_bytes(self) -> int:
        """Memory that one update needs beside its state, on the fullest rank: gradient rows and coordinates."""
        form = self.layout.form
        return (2 * form.n + 2 * form.rank) * self.layout.largest_block * self.dtype.itemsize


@dataclass(slots=True)
class BoundGroup:
    """The parameters of one group, by path."""

    matrices: list[BoundMatrix] = field(default_factory=list)
    dense: list[Tensor] = field(default_factory=list)
    dense_names: dict[Tensor, str] = field(default_factory=dict)
    fresh_replicas: list[tuple[str, Tensor]] = field(default_factory=list)  # plain, by name, not bound before


def canonical_name(name: str) -> str:
    """The name of a parameter without the prefixes that wrappers add."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "") if prefix.startswith("_") else name.removeprefix(prefix)
    return name


def is_low_rank(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    return parameter.ndim == 2 and parameter.numel() > 0 and bool(group["low_rank"])


def bind_group(
    group: Mapping[str, Any],
    first_position: int,
    recipe: Recipe,
    state: MutableMapping[Tensor, dict[str, Tensor]],
    replica_mesh: Callable[[torch.device], DeviceMesh | None],
) -> BoundGroup:
    """Reads layouts and creates the state that is missing.

    Args:
        first_position: of the group's first parameter among all, which names unnamed ones.
        state: of the optimizer, by parameter; what is missing is added.
        replica_mesh: gives the mesh of the ranks that hold copies of plain tensors on a device.
    """
    bound = BoundGroup()
    parameters = group["params"]
    names = group.get("param_names") or [f"parameter_{first_position + index}" for index in range(len(parameters))]
    for name, parameter in zip(map(canonical_name, names), parameters, strict=True):
        if parameter.is_complex():
            raise ValueError(f"parameter {name!r} is complex, {parameter.dtype}; allowed: real floating-point dtypes")
        if parameter.dtype == torch.float16 and recipe.weight_rounding == "stochastic":
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}, which weight_rounding='stochastic' does not round; allowed: "
                "bfloat16 (float32 and float64 need no rounding), or weight_rounding='nearest'"
            )
        plain = not isinstance(parameter, DTensor)
        if plain and parameter not in state:
            bound.fresh_replicas.append((name, parameter))
        if not is_low_rank(parameter, group):
            bound.dense.append(parameter)
            bound.dense_names[parameter] = name
            if parameter not in state:
                state[parameter] = dense_state(parameter)
            continue
        form = tall_form((parameter.shape[0], parameter.shape[1]), recipe.side, recipe.rank)
        try:
            check_dictionary(recipe.dictionary, form.n)
        except ValueError as error:
            raise ValueError(f"parameter {name!r} of shape {form.shape}: {error}") from None
        replicas = replica_mesh(parameter.device) if plain else None
        layout = row_layout(parameter, form, replicas, name)
        matrix = BoundMatrix(name, parameter, layout, arithmetic_dtype(parameter))
        bound.matrices.append(matrix)
        if parameter not in state:
            state[parameter] = _matrix_state(matrix, recipe)
    return bound


def _matrix_state(matrix: BoundMatrix, recipe: Recipe) -> dict[str, Tensor]:
    device = local(matrix.parameter).device
    tensors: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float32)}
    for key, spec in recipe.state(matrix.layout.form, matrix.dtype).items():
        if spec.sharded:
            tensors[key] = matrix.layout.sharded_state(spec.columns, spec.dtype, device)
        else:
            tensors[key] = torch.zeros(spec.columns, dtype=spec.dtype, device=device)
    return tensors


def check_replicas(parameters: Sequence[tuple[str, Tensor]], group: dist.ProcessGroup) -> None:
    """Refuses plain parameters that are not bitwise equal on all ranks of the group. Collective.

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
