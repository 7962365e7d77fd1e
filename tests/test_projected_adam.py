"""GaLore and its relatives equal references from their formulas, under every sharding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from projected_methods import METHODS, SHAPES, STEPS, expected
from references import initial_weight, prescribed_gradients
from support_matrix import supports
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.pieces import FlatPart


def _trajectory(rank: int, method: str, strategy: str, world_size: int) -> dict[str, list[Tensor]]:
    make, options, *_ = METHODS[method]
    model = nn.ParameterDict({name: nn.Parameter(initial_weight(shape)) for name, shape in SHAPES.items()})
    cuts: dict[str, list[tuple[int, int]]] = {}
    if strategy in ("fsdp", "fsdp_rows", "hsdp"):
        shape, names = (
            ((2, world_size // 2), ("replicas", "shards")) if strategy == "hsdp" else ((world_size,), ("all",))
        )
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        shards = mesh.size(mesh.ndim - 1)

        def placement(p: nn.Parameter) -> Shard:
            return Shard(int(strategy != "fsdp_rows" and p.shape[0] < p.shape[1] and p.shape[1] % shards == 0))

        fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    if strategy == "flat":
        for name, shape in SHAPES.items():
            total = shape[0] * shape[1]
            borders = [0, *sorted((17 * k * total // (19 * world_size)) for k in range(1, world_size)), total]
            cuts[name] = list(pairwise(borders))
            model[name] = nn.Parameter(initial_weight(shape).flatten()[slice(*cuts[name][rank])])
    updater = make(list(model.items()), **options)
    if cuts:
        slices = {name: tuple(FlatSlice(SHAPES[name], *cut) for cut in cuts[name]) for name in SHAPES}
        updater.declare_flat_parts({p: [FlatPart(n, 0, slices[n])] for n, p in model.items()}, dist.group.WORLD)
    gradients = {name: prescribed_gradients(shape, STEPS, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    weights: dict[str, list[Tensor]] = {name: [] for name in SHAPES}
    for step in range(STEPS):
        for name, p in model.items():
            gradient = gradients[name][step]
            if cuts:
                gradient = gradient.flatten()[slice(*cuts[name][rank])]
            elif isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = gradient.clone()
        updater.step()
        for name, p in model.items():
            if cuts:
                parts: list[Any] = [None] * world_size
                dist.all_gather_object(parts, p.detach())
                weights[name].append(torch.cat(parts).view(SHAPES[name]))
            else:
                weights[name].append((p.full_tensor() if isinstance(p, DTensor) else p).detach().clone())
    return weights


def _assert_equal(found: dict[str, list[Tensor]], method: str, tolerance: float) -> None:
    for name, weights in expected(method).items():
        for step, (weight, reference) in enumerate(zip(found[name], weights, strict=True), start=1):
            difference = (weight - reference).abs().max().item()
            assert difference <= tolerance, f"{name}, step {step}: off by {difference}"


@supports("exact", strategy="one process")
@pytest.mark.parametrize("optimizer", METHODS)
def test_twenty_steps_equal_the_reference(optimizer: str) -> None:
    _assert_equal(_trajectory(0, optimizer, "one", 1), optimizer, 1e-10)


QUICK = [("ddp", 4), ("fsdp_rows", 3), ("hsdp", 4), ("flat", 3)]
SLOW = [("ddp", 2), ("ddp", 3), ("fsdp", 2), ("fsdp", 4), ("fsdp_rows", 2), ("fsdp_rows", 4), ("flat", 2), ("flat", 4)]

# Sharding does not see what published settings change.
SHARDED = [pytest.param(m, marks=pytest.mark.slow) if m.endswith("_published") else m for m in METHODS]


@supports("exact")
@pytest.mark.parametrize("optimizer", SHARDED)
@pytest.mark.parametrize(
    ("strategy", "world_size"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_twenty_steps_equal_the_reference_under_sharding(optimizer: str, strategy: str, world_size: int) -> None:
    for found in run_on_ranks(world_size, _trajectory, optimizer, strategy, world_size):
        _assert_equal(found, optimizer, 1e-9)
