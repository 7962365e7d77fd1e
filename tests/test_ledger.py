"""The ledger of an optimizer is, to the byte, what the optimizer holds: all storages that can be reached from it."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from processes import run_on_ranks
from test_transient_memory import OPTIMIZERS, laid_out, stand_for
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dist_lowrank.optim import SCALE, Adafactor, DCTAdamW, GaLore, GoLore, Grass, LDAdam, Muon, Trion

WORKSPACE_BYTES = 2**30
RANKS = [  # flat slices are what stages 1 to 3 of ZeRO make; `fsdp_rows` has matrices that are exchanged
    (layout, world_size, rank)
    for layout in ("ddp", "fsdp", "fsdp_rows", "hsdp", "flat")
    for world_size in {"hsdp": (2, 4), "fsdp": (1, 2, 4)}.get(layout, (1, 2, 3, 4))  # what Shard(1) divides
    for rank in range(world_size)
]
FEW = (
    "feedback int4",
    "moments int8",
    "shared",
    "fft",
    "galore",
    "ldadam",
    "dion",
    "smmf, bf16 weights",
    "bf16 operands",
)
FAST = (("ddp", 2, 1), ("fsdp_rows", 3, 2), ("hsdp", 4, 1), ("flat", 3, 0))
FLOAT32, FLOAT64, BF16 = torch.float32, torch.float64, torch.bfloat16
KINDS = OPTIMIZERS | {
    "feedback bf16": (DCTAdamW, {"error_feedback": "bf16", "rank": 7}, FLOAT32),
    "moments bf16, float64": (DCTAdamW, {"moment_dtype": BF16, "error_feedback": "fp32"}, FLOAT64),
    "random columns": (DCTAdamW, {"dictionary": "random", "side": "longer"}, FLOAT32),
    "scores of the step before": (DCTAdamW, {"selection": "previous"}, FLOAT32),
    "identity": (DCTAdamW, {"dictionary": "identity", "rank": 1}, FLOAT32),
    "dct3, fft": (DCTAdamW, {"dictionary": "dct3", "transform": "fft", "side": "unsharded"}, FLOAT64),
    "galore, int8": (GaLore, {"moment_dtype": torch.int8, "refresh_interval": 3, "state_dtype": "weights"}, BF16),
    "galore, grassmann": (GaLore, {"subspace": "grassmann"}, FLOAT32),
    "ldadam, power": (LDAdam, {"subspace": "power", "error_feedback": "int8"}, FLOAT32),
    "golore": (GoLore, {"refresh_interval": 2, "switch_step": 2}, FLOAT32),
    "grass": (Grass, {}, FLOAT32),
    "trion, bf16 weights": (Trion, {}, BF16),
    "muon, bf16": (Muon, {"moment_dtype": BF16}, FLOAT32),
    "adafactor, momentum": (Adafactor, {"beta1": 0.9}, FLOAT64),
    "scale": (SCALE, {"vocabulary": "head"}, FLOAT32),
}


# Code, through whose globals all is reached; models; and meshes, which are torch's and hold the numbers of ranks.
_NOT_HELD = (type, types.ModuleType, types.FunctionType, types.FrameType, nn.Module, DeviceMesh)


def reachable_storage_bytes(root: object, beside: list[Tensor]) -> int:
    """Of all tensors to which references lead from an object, through whatever Python objects; each storage once."""
    storages: dict[int, int] = {}
    known, waiting = {id(root)}, [root]
    while waiting:
        each = waiting.pop()
        if isinstance(each, DTensor):
            waiting.append(each.to_local())
        elif isinstance(each, Tensor):
            storage = each.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        else:
            found = [other for other in gc.get_referents(each) if not isinstance(other, _NOT_HELD)]
            waiting += [other for other in found if id(other) not in known]
            known |= {id(other) for other in found}
    for tensor in beside:
        local = tensor.detach()
        local = local.to_local() if isinstance(local, DTensor) else local
        storages.pop(local.untyped_storage()._cdata, None)
    return sum(storages.values())


def _differences(_: int, layout: str, world_size: int, rank: int, kinds: list[str]) -> list[tuple[Any, ...]]:
    """(kind, step, by cause, what is reached) where the ledger is not what is reached."""
    stand_for(rank, world_size)
    wrong: list[tuple[Any, ...]] = []
    for name in kinds:
        updater, named, options = laid_out(rank, layout, world_size, KINDS[name], WORKSPACE_BYTES)
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        beside = [tensor for _, p in named for tensor in (p, p.grad)]
        for step in range(1 + max(2, options.get("refresh_interval", 1))):
            if step:
                updater.step()
            by_cause = updater.memory_bytes()
            reached_bytes = reachable_storage_bytes(updater, beside)
            if not sum(by_cause.values()) == reached_bytes > 0:
                wrong.append((name, step, by_cause, reached_bytes))
    return wrong


def _check(layout: str, world_size: int, rank: int, kinds: Iterable[str]) -> None:
    arguments = (layout, world_size, rank, list(kinds))
    (wrong,) = run_on_ranks(1, _differences, *arguments, distributed=False, timeout_seconds=280)
    assert wrong == []


@pytest.mark.parametrize(("layout", "world_size", "rank"), FAST)
def test_the_ledger_is_what_can_be_reached_from_an_optimizer(layout: str, world_size: int, rank: int) -> None:
    _check(layout, world_size, rank, FEW)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world_size", "rank"), RANKS)
def test_the_ledger_of_every_kind_is_what_can_be_reached(layout: str, world_size: int, rank: int) -> None:
    _check(layout, world_size, rank, KINDS)


def test_what_is_reached_counts_storages_once_and_misses_nothing() -> None:
    class Holder:
        def __init__(self) -> None:
            self.kept = {"a": [torch.zeros(10), (torch.zeros(3, dtype=torch.int16),)]}
            self.view = self.kept["a"][0][2:4]
            self.weight = nn.Parameter(torch.zeros(7))

    holder = Holder()
    assert reachable_storage_bytes(holder, [holder.weight]) == 40 + 6
    assert reachable_storage_bytes(holder, []) == 40 + 6 + 28


def test_dictionaries_are_held_once_for_each_size_and_device() -> None:
    weights = [nn.Parameter(torch.ones(shape)) for shape in ((40, 16), (16, 50), (16, 16), (30, 24))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    updater = DCTAdamW(weights, rank=4)
    updater.step()
    assert updater.memory_bytes()["dictionary"] == 4 * (16 * 16 + 24 * 24)
