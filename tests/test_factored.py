"""SCALE, Adafactor, CAME, SMMF and AdamW8bit equal references from their formulas, under every sharding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from factored_references import (
    ReferenceAdafactor,
    ReferenceAdamW8bit,
    ReferenceCAME,
    ReferenceSCALE,
    ReferenceSMMF,
)
from processes import run_on_ranks
from references import ReferenceAdamW, initial_weight, prescribed_gradients
from sharded_models import full, joined, placed_as, random_cuts
from support_matrix import supports
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from dist_lowrank.optim import CAME, SCALE, SMMF, Adafactor, AdamW8bit
from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.pieces import FlatPart

STEPS = 20
# Rows that do not divide, fewer rows than ranks, 4400 elements in 8 bits with a short block at the end of each row, a
# prime number of elements, and a parameter on the dense path.
SHAPES: dict[str, tuple[int, ...]] = {
    "tall": (14, 6),
    "wide": (8, 12),
    "square": (9, 9),
    "few": (3, 4),
    "long": (11, 400),
    "prime": (1, 13),
    "norm": (6,),
}
ROLES = {"tall": "embedding", "wide": "head", "few": "tied"}  # others are hidden
SHARED: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
# Optimizer and options, reference and options.
METHODS: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any]]] = {
    "scale": (SCALE, {"momentum": 0.8, "dense_lr": 0.01}, ReferenceSCALE, {"momentum": 0.8}),
    "adafactor": (Adafactor, {}, ReferenceAdafactor, {}),
    "adafactor_momentum": (
        Adafactor,
        {"beta1": 0.9, "decay_rate": -0.5},
        ReferenceAdafactor,
        {"beta1": 0.9, "decay_rate": -0.5},
    ),
    "came": (CAME, {"betas": (0.9, 0.95, 0.995)}, ReferenceCAME, {"betas": (0.9, 0.95, 0.995)}),
    "smmf": (SMMF, {}, ReferenceSMMF, {}),
    "smmf_transformers": (SMMF, {"gamma": -0.8}, ReferenceSMMF, {"gamma": -0.8}),
    "adamw8bit": (AdamW8bit, {}, ReferenceAdamW8bit, {}),
}
SHARDED = [name for name in METHODS if name != "smmf_transformers"]


@cache
def expected(method: str) -> dict[str, list[Tensor]]:
    """By name: the weight after every step."""
    _, _, make, options = METHODS[method]
    trajectories = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        weight = initial_weight(shape, seed=index)
        more = {"role": ROLES.get(name)} if method == "scale" else {}
        reference = (
            make(weight, **SHARED, **options, **more)
            if len(shape) == 2
            else ReferenceAdamW(weight, **SHARED, betas=(0.9, 0.999))
        )
        trajectories[name] = []
        for gradient in prescribed_gradients(shape, STEPS, seed=index):
            reference.step(gradient)
            trajectories[name].append(reference.weight.clone())
    return trajectories


def groups_of(named: dict[str, Any]) -> list[dict[str, Any]]:
    """As `param_groups(model, vocabulary="matrices")` makes them."""
    kinds = {kind: [(name, p) for name, p in named.items() if ROLES.get(name) == kind] for kind in ROLES.values()}
    groups: list[dict[str, Any]] = [{"params": [(name, p) for name, p in named.items() if name not in ROLES]}]
    return groups + [{"params": params, "vocabulary": kind} for kind, params in kinds.items()]


def start(rank: int, method: str, strategy: str, world_size: int, dtype: torch.dtype) -> tuple[dict[str, Any], Any]:
    """Sharded parameters by name, and the optimizer."""
    make, options, *_ = METHODS[method]
    model = nn.ParameterDict(
        {name: nn.Parameter(initial_weight(shape, seed=i).to(dtype)) for i, (name, shape) in enumerate(SHAPES.items())}
    )
    if strategy == "flat":
        cuts = random_cuts(SHAPES, world_size)
        flat = {name: nn.Parameter(p.detach().flatten()[slice(*cuts[name][rank])]) for name, p in model.items()}
        updater = make(groups_of(flat), **SHARED, **options)
        slices = {name: tuple(FlatSlice(SHAPES[name], *cut) for cut in cuts[name]) for name in SHAPES}
        updater.declare_flat_parts({p: [FlatPart(n, 0, slices[n])] for n, p in flat.items()}, dist.group.WORLD)
        return flat, updater
    if strategy.startswith(("fsdp", "hsdp")):
        sizes, names = ((2, world_size // 2), ("copies", "shards")) if strategy == "hsdp" else ((world_size,), ("all",))
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)

        def placement(p: nn.Parameter) -> Shard:
            # FSDP2 cuts dimension 1 evenly only.
            return Shard(int(strategy == "fsdp_last" and p.ndim == 2 and p.shape[1] % world_size == 0))

        fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    named = dict(model.items())
    return named, make(groups_of(named), **SHARED, **options)


@cache
def gradients() -> dict[str, Tensor]:
    return {name: prescribed_gradients(shape, STEPS, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}


def feed(named: dict[str, Any], step: int, rank: int, strategy: str, world_size: int) -> None:
    cuts = random_cuts(SHAPES, world_size) if strategy == "flat" else {}
    for name, p in named.items():
        gradient = gradients()[name][step].to(p.dtype)
        p.grad = gradient.flatten()[slice(*cuts[name][rank])].clone() if cuts else placed_as(p, gradient.clone())


def whole(named: dict[str, Any], strategy: str) -> dict[str, Tensor]:
    return {name: joined(p, SHAPES[name]) if strategy == "flat" else full(p) for name, p in named.items()}


def _trajectory(
    rank: int, method: str, strategy: str, world_size: int, checked: Sequence[int]
) -> dict[int, dict[str, Tensor]]:
    """By step of `checked` and by name: the weights."""
    named, updater = start(rank, method, strategy, world_size, torch.float64)
    weights = {}
    for step in range(1, STEPS + 1):
        feed(named, step - 1, rank, strategy, world_size)
        updater.step()
        if step in checked:
            weights[step] = whole(named, strategy)
    return weights


def _trajectories(rank: int, strategy: str, world_size: int) -> dict[str, dict[int, dict[str, Tensor]]]:
    return {method: _trajectory(rank, method, strategy, world_size, (1, 6, STEPS)) for method in SHARDED}


@cache
def on_ranks(strategy: str, world_size: int) -> list[dict[str, dict[int, dict[str, Tensor]]]]:
    """All optimizers in one group of processes."""
    return run_on_ranks(world_size, _trajectories, strategy, world_size)


def _assert_equal(found: dict[int, dict[str, Tensor]], method: str, tolerance: float) -> None:
    for step, weights in found.items():
        for name, weight in weights.items():
            difference = (weight - expected(method)[name][step - 1]).abs().max().item()
            assert difference <= tolerance, f"{name}, step {step}: off by {difference}"


@supports("exact", strategy="one process")
@pytest.mark.parametrize("optimizer", METHODS)
def test_twenty_steps_equal_the_reference(optimizer: str) -> None:
    _assert_equal(_trajectory(0, optimizer, "one", 1, range(1, STEPS + 1)), optimizer, 1e-10)


QUICK = [("ddp", 2), ("fsdp", 2), ("fsdp_last", 2), ("flat", 3)]
SLOW = [("ddp", 3), ("ddp", 4), ("fsdp", 1), ("fsdp", 4), ("fsdp_last", 4), ("hsdp", 4), ("flat", 2), ("flat", 4)]


@supports("exact")
@pytest.mark.parametrize("optimizer", SHARDED)
@pytest.mark.parametrize(
    ("strategy", "world_size"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_twenty_steps_equal_the_reference_under_sharding(optimizer: str, strategy: str, world_size: int) -> None:
    for found in on_ranks(strategy, world_size):
        _assert_equal(found[optimizer], optimizer, 1e-9)
