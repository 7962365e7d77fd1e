"""Binding: what an optimizer learns about its parameters, once, when they are final.

Wrappers such as FSDP2 or accelerate replace parameters after an optimizer was built, so nothing is read from them
before the first `step`, `state_dict` or `load_state_dict`, and again if they are not the same later. Every rank creates
all of its state at once, so that keys agree everywhere.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dist_lowrank.optim.dense import DenseParameter, arithmetic_dtype, dense_state, state_dtype
from dist_lowrank.optim.dormant import dormant_zeros
from dist_lowrank.optim.recipe import Recipe
from dist_lowrank.optim.roles import Role
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.state_dict import STRUCTURAL_OPTIONS
from dist_lowrank.sharding.layouts import Layout, LayoutError, local, tall_form
from dist_lowrank.sharding.pieces import FlatPlace, Piece, cut_parameter
from dist_lowrank.sharding.reading import read_layout, sharded_axis
from dist_lowrank.sharding.rounds import ranks_that_differ

_WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(slots=True)
class BoundMatrix:
    """A matrix on the low-rank path: a parameter, or a piece of one."""

    piece: Piece
    parameter: Tensor
    layout: Layout
    dtype: torch.dtype  # of the arithmetic
    specs: Mapping[str, StateTensor]  # of its state, beside the step counter
    position: int = 0  # among the matrices of the optimizer
    captured_energy: Tensor | None = None  # share of the score in the chosen columns, at the last refresh
    previous_indices: Tensor | None = None  # what was chosen before the last refresh; empty if that was the first
    role: Role | None = None  # whose dictionary it shares
    scores: Tensor | None = None  # of columns at the coming step, where gradients were summed as coefficients

    @property
    def name(self) -> str:
        return self.piece.name

    @property
    def present(self) -> bool:
        """Whether this rank has a share of it; always, but for the matrices of a stack that others hold."""
        return self.piece.stack is None or self.piece.stack.present

    def state(self, of_parameter: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """This rank's tensors of this matrix, out of the state of its parameter; perhaps also a role's dictionary."""
        if self.piece.whole and self.layout.mesh is None:
            return of_parameter
        own = {key: local(of_parameter[self.piece.prefix + key]) for key in ("step", *self.specs)}
        stack = self.piece.stack
        if stack is None:
            return own
        return {key: tensor[stack.index - stack.start] if tensor.ndim else tensor for key, tensor in own.items()}


@dataclass(slots=True)
class BoundParameter:
    """What an optimizer knows of a parameter: its pieces, by path."""

    name: str
    parameter: Tensor
    structure: Mapping[str, Any]  # the options that fix the shapes and the meaning of state
    sharers: tuple[tuple[dist.ProcessGroup, bool], ...]  # groups of several ranks; whether they hold replicas
    matrices: list[BoundMatrix] = field(default_factory=list)
    dense: list[DenseParameter] = field(default_factory=list)
    fresh_state: dict[str, Tensor] = field(default_factory=dict)  # on its way to the optimizer's state


def canonical_name(name: str) -> str:
    """The name of a parameter without the prefixes that wrappers add."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name.removeprefix("module.")  # DDP's, also under torch.compile


def is_trained(parameter: Tensor) -> bool:
    """Whether a parameter needs state. Frozen ones do not, unless somebody gives them gradients by hand."""
    return parameter.requires_grad or parameter.grad is not None


def sharers_of(
    parameter: Tensor, replicas: DeviceMesh | None, place: FlatPlace | None
) -> tuple[tuple[dist.ProcessGroup, bool], ...]:
    """The groups of ranks that share a parameter: those that hold shards of it first, then replicas."""
    if place is not None:
        return ((place.group, False),)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        axes = [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1]
        groups = [(mesh.get_group(axis), parameter.placements[axis].is_replicate()) for axis in axes]
        return tuple(sorted(groups, key=lambda each: each[1]))
    return ((replicas.get_group(), True),) if replicas is not None and replicas.size() > 1 else ()


def structure_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that state follows."""
    names = (*STRUCTURAL_OPTIONS, "rank", "column_bias_correction", "capturable")
    return {name: copy.copy(options.get(name)) for name in names}


def bind_parameter(
    name: str,
    parameter: Tensor,
    options: Mapping[str, Any],
    recipe: Recipe,
    state: Mapping[str, Tensor],
    replicas: DeviceMesh | None,
    place: FlatPlace | None,
) -> BoundParameter:
    """Reads the layout of a parameter, and makes its state if it has none.

    Args:
        options: of its group.
        state: of the parameter.
        replicas: the ranks that hold copies of it, for a plain tensor; None: this rank alone.
        place: what a flat tensor holds.

    Raises:
        ValueError: a parameter or an option that cannot be followed.
        LayoutError: a sharding that cannot.
    """
    if parameter.is_complex():
        raise ValueError(f"parameter {name!r} is complex, {parameter.dtype}; allowed: real floating-point dtypes")
    if parameter.dtype == torch.float16 and recipe.weight_rounding == "stochastic":
        raise ValueError(
            f"parameter {name!r} is {parameter.dtype}, which weight_rounding='stochastic' does not round; allowed: "
            "bfloat16 (float32 and float64 need no rounding), or weight_rounding='nearest'"
        )
    if place is None and (getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False)):
        raise LayoutError(
            f"parameter {name!r} is flattened by FSDP1 (FullyShardedDataParallel), so that no matrix can be told from "
            "it; allowed: FSDP2, `torch.distributed.fsdp.fully_shard`"
        )
    bound = BoundParameter(name, parameter, structure_of(options), sharers_of(parameter, replicas, place))
    fresh, stored = bound.fresh_state, state_dtype(parameter, options.get("state_dtype"))
    for piece in cut_parameter(name, parameter, options, place):
        if not piece.whole and not local(parameter).is_contiguous():
            raise ValueError(
                f"parameter {name!r} is not contiguous in memory and not updated as one; allowed: contiguous tensors "
                "(no channels_last), or low_rank=False"
            )
        if len(piece.shape) != 2 or math.prod(piece.shape) == 0 or not options["low_rank"]:
            dense = DenseParameter(piece, parameter, None if place is None else place.group)
            bound.dense.append(dense)
            if not state:
                fresh |= dense_state(dense, stored)
            continue
        form = tall_form(piece.shape, recipe.side, recipe.rank, sharded_axis(piece, parameter))
        try:
            recipe.check(form)
            recipe.check_parameter(parameter)
        except ValueError as error:
            raise ValueError(f"parameter {piece.name!r} of shape {form.shape}: {error}") from None
        layout = read_layout(piece, parameter, form, replicas, None if place is None else place.group)
        specs = recipe.state(form, stored)
        bound.matrices.append(BoundMatrix(piece, parameter, layout, arithmetic_dtype(parameter), specs))
        if not state and f"{piece.prefix}step" not in fresh:  # the matrices of a stack share theirs
            device = local(parameter).device if recipe.capturable else "cpu"
            fresh[f"{piece.prefix}step"] = torch.zeros((), dtype=torch.float32, device=device)
            fresh |= {piece.prefix + key: _zeros(piece, layout, spec, parameter) for key, spec in specs.items()}
    return bound


def _zeros(piece: Piece, layout: Layout, spec: StateTensor, parameter: Tensor) -> Tensor:
    """A state tensor: (rows, columns) globally, sharded by rows, or (columns,); of a stack, one more axis in front."""
    stack, mesh = piece.stack, layout.mesh
    shape: tuple[int, ...] = (spec.columns,) if spec.rows is None else (spec.rows, spec.columns)
    block = shape
    if spec.sharded:
        shape, block = (layout.form.rows, spec.columns), (layout.stop - layout.start, spec.columns)
    placements = list(layout.placements) if spec.sharded else []
    if stack is not None:
        shape, block = (stack.size, *shape), (stack.stop - stack.start, *block)
        placements = [Shard(1) if isinstance(each, Shard) else each for each in placements]
        if stack.mesh_axis is not None:
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            placements = placements or [Replicate() for _ in range(mesh.ndim)]
            placements[stack.mesh_axis] = Shard(0)
    zeros = dormant_zeros if spec.dormant else torch.zeros
    values = zeros(block, dtype=spec.dtype, device=local(parameter).device)
    if mesh is None or not placements:
        return values
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(values, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


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


def check_loaded_shards(shards: Sequence[DTensor], flat: Sequence[tuple[dist.ProcessGroup, Tensor]] = ()) -> None:
    """Refuses shards of state that one rank saved and several loaded. Collective.

    A state dict that rank 0 pickled has rank 0's rows in its DTensors, and they fit everywhere if rows divide evenly.
    Ranks whose parts are the same in every tensor, to the bit, have loaded such a file.

    Args:
        flat: cut state of flat tensors, and the ranks among which it is cut.

    Raises:
        RuntimeError: on every rank.
    """
    by_group: dict[Any, list[Tensor]] = {}
    for tensor in shards:
        mesh = tensor.device_mesh
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard) and mesh.size(axis) > 1:
                by_group.setdefault(mesh.get_group(axis), []).append(local(tensor))
    for group, part in flat:
        by_group.setdefault(group, []).append(part)
    for group, members in by_group.items():
        own = torch.stack(list(map(_checksum, members)))
        differing = {rank for rank, _ in ranks_that_differ(own, group)}
        same = [rank for rank in range(1, dist.get_world_size(group)) if rank not in differing]
        votes = torch.tensor([int(any(bool(tensor.any()) for tensor in members))], device=own.device)
        dist.all_reduce(votes, group=group)
        if same and int(votes) == dist.get_world_size(group):
            raise RuntimeError(
                f"ranks {[0, *same]} have loaded the same rows of the optimizer's state: one rank saved it, and it is "
                "that rank's part. Save `full_state_dict(optimizer)`, or through torch.distributed.checkpoint"
            )
