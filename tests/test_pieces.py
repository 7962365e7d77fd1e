"""Expert stacks, convolutions and fused weights are updated as the matrices that they are, under any sharding."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import run_on_ranks
from references import ReferenceAdamW, ReferenceDCTAdamW, ReferenceTrion
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dist_lowrank.optim import DCTAdamW, Trion, full_state_dict
from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.pieces import FlatPart

STEPS = 12
# Name: shape, and options of its group.
PARAMETERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "experts": ((3, 6, 4), {"higher_dims": "stack"}),
    "wide_experts": ((5, 4, 8), {"higher_dims": "stack"}),
    "fused_experts": ((2, 10, 4), {"higher_dims": "stack", "split": [6, 4]}),
    "qkv": ((13, 6), {"split": (8, 3, 2)}),
    "gate_up": ((6, 12), {"split": [5, 7], "split_dim": 1}),
    "convolution": ((6, 3, 2, 2), {"higher_dims": "flatten"}),
    "dense_convolution": ((4, 3, 2), {}),
    "matrix": ((8, 6), {}),
    "bias": ((5,), {}),
}
OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "rank": 0.5}
OPTIMIZERS = {"dct_adamw": (DCTAdamW, ReferenceDCTAdamW), "trion": (Trion, ReferenceTrion)}


def value(name: str, step: int) -> Tensor:
    shape, _ = PARAMETERS[name]
    generator = torch.Generator().manual_seed(100 * step + list(PARAMETERS).index(name))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def matrices(name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices that a tensor consists of, as views."""
    _, options = PARAMETERS[name]
    parts = [tensor]
    if options.get("higher_dims") == "stack":
        parts = list(tensor)
    if options.get("higher_dims") == "flatten":
        parts = [tensor.view(tensor.shape[0], -1)]
    if "split" in options:
        parts = [part for each in parts for part in each.split(list(options["split"]), options.get("split_dim", 0))]
    return parts


@cache
def expected(optimizer: str) -> dict[str, Tensor]:
    """Each matrix trained by the reference of its own, everything else by the reference of AdamW."""
    weights = {}
    for name in PARAMETERS:
        weight = value(name, 0)
        parts = matrices(name, weight)
        if parts[0].ndim == 2:
            references = [OPTIMIZERS[optimizer][1](part, **OPTIONS) for part in parts]
        else:
            references = [ReferenceAdamW(part, **({"betas": (0.9, 0.99)} | _dense(optimizer))) for part in parts]
        for step in range(1, STEPS + 1):
            for reference, gradient in zip(references, matrices(name, value(name, step)), strict=True):
                reference.step(gradient)
        for part, reference in zip(parts, references, strict=True):
            part.copy_(reference.weight)
        weights[name] = weight
    return weights


def _dense(optimizer: str) -> dict[str, Any]:
    if optimizer == "dct_adamw":
        return {"lr": OPTIONS["lr"], "weight_decay": OPTIONS["weight_decay"]}
    defaults = Trion([nn.Parameter(torch.zeros(2, 2))], **OPTIONS).defaults
    return {"lr": defaults["dense_lr"], "betas": defaults["dense_betas"], "weight_decay": OPTIONS["weight_decay"]}


def shard(model: nn.Module, strategy: str, world_size: int) -> None:
    if strategy == "ddp":
        return
    names = {id(p): name for name, p in model.named_parameters()}
    mesh = init_device_mesh("cpu", (world_size,))
    if strategy == "hsdp":
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))

    def placement(p: nn.Parameter) -> Shard:
        if strategy != "fsdp_last":
            return Shard(0)
        # The last dimension that divides; not the one that is split.
        split = PARAMETERS[names[id(p)]][1].get("split_dim", 0) if "split" in PARAMETERS[names[id(p)]][1] else None
        if PARAMETERS[names[id(p)]][1].get("higher_dims") == "flatten":
            return Shard(0)
        for dim in reversed(range(p.ndim)):
            if p.shape[dim] % world_size == 0 and (split is None or dim != p.ndim - 2 + split):
                return Shard(dim)
        return Shard(0)

    fully_shard(model, mesh=mesh, shard_placement_fn=placement)


def cuts(name: str, world_size: int) -> list[tuple[int, int]]:
    elements = math.prod(PARAMETERS[name][0])
    generator = torch.Generator().manual_seed(world_size + 10 * list(PARAMETERS).index(name))
    inner = torch.randint(0, elements + 1, (world_size - 1,), generator=generator).sort().values.tolist()
    return list(pairwise([0, *inner, elements]))


def build(strategy: str, world_size: int, optimizer: str, rank: int) -> tuple[nn.ParameterDict, Any]:
    """Parameters and an optimizer. `flat`: one tensor for all parameters that have the same options, and padding."""
    make = OPTIMIZERS[optimizer][0]
    model = nn.ParameterDict({name: nn.Parameter(value(name, 0)) for name in PARAMETERS})
    if strategy != "flat":
        shard(model, strategy, world_size)
        groups = [{"params": [(name, model[name])], **options} for name, (_, options) in PARAMETERS.items()]
        return model, make(groups, **OPTIONS)
    tensors, groups, places = nn.ParameterDict(), [], {}
    for names in _flat_groups():
        parts, position = [], 0
        runs = {name: cuts(name, world_size) for name in names}
        for name in names:
            slices = tuple(FlatSlice(PARAMETERS[name][0], *cut) for cut in runs[name])
            parts.append(FlatPart(name, position, slices))
            position += runs[name][rank][1] - runs[name][rank][0]
        key = "+".join(names)
        tensors[key] = nn.Parameter(torch.zeros(position + 2, dtype=torch.float64))
        places[tensors[key]] = parts
        groups.append({"params": [(key, tensors[key])], **PARAMETERS[names[0]][1]})
    updater = make(groups, **OPTIONS)
    updater.declare_flat_parts(places, dist.group.WORLD)
    with torch.no_grad():
        _fill(tensors, 0, world_size, rank)
    return tensors, updater


def _flat_groups() -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name, (_, options) in PARAMETERS.items():
        if options.get("split_dim") != 1:
            groups.setdefault(str(options), []).append(name)
    return list(groups.values())


def _fill(tensors: nn.ParameterDict, step: int, world_size: int, rank: int) -> None:
    for names in _flat_groups():
        runs = [value(name, step).flatten()[slice(*cuts(name, world_size)[rank])] for name in names]
        tensors["+".join(names)].data = torch.cat([*runs, torch.zeros(2, dtype=torch.float64)])


def feed(model: nn.ParameterDict, updater: Any, strategy: str, world_size: int, rank: int, steps: range) -> None:
    for step in steps:
        if strategy == "flat":
            gradients = nn.ParameterDict({key: nn.Parameter(torch.empty(0)) for key in model})
            _fill(gradients, step, world_size, rank)
            for key, p in model.items():
                p.grad = gradients[key].data
        else:
            for name, p in model.items():
                gradient = value(name, step)
                if isinstance(p, DTensor):
                    gradient = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)
                p.grad = gradient
        updater.step()


def weights_of(model: nn.ParameterDict, strategy: str, world_size: int) -> dict[str, Tensor]:
    if strategy != "flat":
        return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.items()}
    weights = {}
    for names in _flat_groups():
        held: list[Any] = [None] * world_size
        dist.all_gather_object(held, model["+".join(names)].detach())
        assert all(not tensor[-2:].any() for tensor in held)  # the padding
        positions = [0] * world_size
        for name in names:
            parts = []
            for k, (start, stop) in enumerate(cuts(name, world_size)):
                parts.append(held[k][positions[k] : positions[k] + stop - start])
                positions[k] += stop - start
            weights[name] = torch.cat(parts).view(PARAMETERS[name][0])
    return weights


def _trajectory(rank: int, strategy: str, world_size: int, optimizer: str) -> dict[str, Tensor]:
    model, updater = build(strategy, world_size, optimizer, rank)
    feed(model, updater, strategy, world_size, rank, range(1, STEPS + 1))
    updater.captured_energy()
    assert sum(updater.memory_bytes().values()) > 0
    return weights_of(model, strategy, world_size)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_process_equals_the_references_of_the_single_matrices(optimizer: str) -> None:
    for name, weight in _trajectory(0, "ddp", 1, optimizer).items():
        torch.testing.assert_close(weight, expected(optimizer)[name], atol=1e-10, rtol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("strategy", "world_size"),
    [
        *(("ddp", 2), ("ddp", 4), ("hsdp", 4)),
        *((strategy, size) for strategy in ("fsdp", "fsdp_last", "flat") for size in (1, 2, 3, 4)),
    ],
)
def test_pieces_follow_the_same_trajectory_under_every_sharding(strategy: str, world_size: int, optimizer: str) -> None:
    for found in run_on_ranks(world_size, _trajectory, strategy, world_size, optimizer):
        assert len(found) == len(PARAMETERS) - (strategy == "flat")
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected(optimizer)[name], atol=1e-10, rtol=0)


def _save(rank: int, strategy: str, world_size: int, folder: str) -> None:
    model, updater = build(strategy, world_size, "dct_adamw", rank)
    feed(model, updater, strategy, world_size, rank, range(1, 6))
    weights = weights_of(model, strategy, world_size)
    dcp.save({"optimizer": get_optimizer_state_dict(model, updater), "weights": weights}, checkpoint_id=folder)


def _resume(rank: int, strategy: str, world_size: int, folder: str) -> dict[str, Tensor]:
    model, updater = build(strategy, world_size, "dct_adamw", rank)
    state = {
        "optimizer": get_optimizer_state_dict(model, updater),
        "weights": weights_of(model, strategy, world_size),
    }
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, updater, state["optimizer"])
    with torch.no_grad():
        for name, p in model.items():
            weight = state["weights"][name]
            if isinstance(p, DTensor):
                weight = distribute_tensor(weight, p.device_mesh, p.placements, src_data_rank=None)
            p.copy_(weight)
    feed(model, updater, strategy, world_size, rank, range(6, STEPS + 1))
    return weights_of(model, strategy, world_size)


@pytest.mark.parametrize(("strategy", "world_size"), [("fsdp", 3), ("fsdp", 2), ("fsdp", 1), ("fsdp_last", 2)])
def test_a_torch_checkpoint_of_pieces_continues_on_another_world_size(
    tmp_path: Path, strategy: str, world_size: int
) -> None:
    run_on_ranks(3, _save, "fsdp", 3, str(tmp_path))
    for found in run_on_ranks(world_size, _resume, strategy, world_size, str(tmp_path)):
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected("dct_adamw")[name], atol=1e-10, rtol=0)


def _gather(rank: int, world_size: int) -> dict[str, Any]:
    model, updater = build("flat", world_size, "dct_adamw", rank)
    feed(model, updater, "flat", world_size, rank, range(1, 6))
    return {"state": full_state_dict(updater), "weights": weights_of(model, "flat", world_size)}


def _scatter(rank: int, world_size: int, saved: dict[str, Any]) -> dict[str, Tensor]:
    model, updater = build("flat", world_size, "dct_adamw", rank)
    updater.load_state_dict(saved["state"])
    with torch.no_grad():
        for names in _flat_groups():
            runs = [saved["weights"][name].flatten()[slice(*cuts(name, world_size)[rank])] for name in names]
            model["+".join(names)][:-2] = torch.cat(runs)
    feed(model, updater, "flat", world_size, rank, range(6, STEPS + 1))
    return weights_of(model, "flat", world_size)


@pytest.mark.parametrize("world_size", [4, 2, 1])
def test_the_gathered_state_of_flat_tensors_continues_with_other_cuts(world_size: int) -> None:
    gathered = run_on_ranks(3, _gather, 3)
    for rank in (1, 2):
        for index, state in gathered[0]["state"]["state"].items():
            for key, tensor in state.items():
                assert torch.equal(gathered[rank]["state"]["state"][index][key], tensor)
    assert gathered[0]["state"]["state"][0]["experts[2].exp_avg"].shape == (6, 2)
    for found in run_on_ranks(world_size, _scatter, world_size, gathered[0]):
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected("dct_adamw")[name], atol=1e-10, rtol=0)


def test_the_matrices_of_a_stack_choose_columns_of_their_own_and_have_names() -> None:
    model, updater = build("ddp", 1, "dct_adamw", 0)
    feed(model, updater, "ddp", 1, 0, range(1, 3))
    state = updater.state[model["experts"]]
    assert state["indices"].shape == (3, 2)
    assert state["exp_avg"].shape == (3, 6, 2)
    energies = updater.captured_energy()
    assert {"experts[0]", "experts[2]", "qkv[1]", "fused_experts[1][0]", "convolution"} <= set(energies)
    assert len(set(energies.values())) == len(energies)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((6, 4), {"split": [4, 3]}, r"split: \[4, 3\] is not allowed for parameter 'w' of shape \(6, 4\); .* to 6"),
        ((6, 4), {"split": [4, 2], "split_dim": 2}, "split_dim: 2 is not allowed; allowed: 0, 1"),
        ((6, 4), {"split": 3}, "split: 3 is not allowed; allowed: None, or a list of sizes"),
        ((6, 4), {"split": [6, 0]}, "split: 0 is not allowed; allowed: an integer >= 1"),
        ((6, 4), {"higher_dims": "fold"}, "higher_dims: 'fold' is not allowed; allowed: dense, stack, flatten"),
    ],
)
def test_sizes_and_words_that_do_not_fit_are_refused(
    shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DCTAdamW([{"params": [("w", nn.Parameter(torch.ones(shape)))], **options}]).bind()


def test_a_flattened_weight_in_channels_last_is_refused_rather_than_lost() -> None:
    weight = nn.Parameter(torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match=r"'w' is not contiguous.*no channels_last"):
        DCTAdamW([{"params": [("w", weight)], "higher_dims": "flatten"}]).bind()


def _split_along_the_shards(rank: int) -> str:
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(6, 4))})
    fully_shard(model, shard_placement_fn=lambda _: Shard(1))
    updater = DCTAdamW([{"params": [("w", model["w"])], "split": [2, 2], "split_dim": 1}])
    with pytest.raises(ValueError, match="dimension 1, which is sharded") as caught:
        updater.bind()
    return str(caught.value)


def test_a_split_that_cannot_be_followed_names_the_way_out() -> None:
    assert all(
        "allowed: sharded along another dimension" in message for message in run_on_ranks(2, _split_along_the_shards)
    )
