"""The ledger of an optimizer is, to the byte, what the optimizer holds: all storages that can be reached from it."""

from __future__ import annotations

import gc
import types
from itertools import product
from typing import Any

import pytest
import torch
from processes import run_on_ranks
from test_transient_memory import OPTIMIZERS, laid_out, stand_for
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

WORKSPACE_BYTES = 2**30
LAYOUTS = ("ddp", "fsdp", "fsdp_rows", "hsdp", "flat")  # flat slices are what ZeRO's stages 1 to 3 make
# Each kind of state and of cache once; all others are slow tests.
FEW = (
    "dct_adamw",
    "feedback int4",
    "moments int8",
    "shared",
    "fft",
    "galore",
    "ldadam",
    "muon",
    "dion",
    "smmf, bf16 weights",
)
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


def _differences(_: int, layout: str, world_size: int, rank: int, optimizers: list[str]) -> list[tuple[Any, ...]]:
    """(optimizer, step, by cause, what is reached) where the ledger is not what is reached; and how many were equal."""
    stand_for(rank, world_size)
    wrong: list[tuple[Any, ...]] = []
    for optimizer in optimizers:
        updater, named, options = laid_out(rank, layout, world_size, optimizer, WORKSPACE_BYTES)
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        beside = [tensor for _, p in named for tensor in (p, p.grad)]
        for step in range(1 + max(2, options.get("refresh_interval", 1))):
            if step:
                updater.step()
            by_cause = updater.memory_bytes()
            reached = reachable_storage_bytes(updater, beside)
            if sum(by_cause.values()) != reached or (step and not reached):
                wrong.append((optimizer, step, by_cause, reached))
    return wrong


def _check(layout: str, world_size: int, rank: int, optimizers: list[str]) -> None:
    (wrong,) = run_on_ranks(
        1, _differences, layout, world_size, rank, optimizers, distributed=False, timeout_seconds=300
    )
    assert wrong == []


@pytest.mark.parametrize(
    ("layout", "world_size", "rank"), [("ddp", 1, 0), ("fsdp_rows", 3, 2), ("hsdp", 4, 1), ("flat", 3, 0)]
)
def test_the_ledger_is_the_storages_that_can_be_reached_from_an_optimizer(
    layout: str, world_size: int, rank: int
) -> None:
    _check(layout, world_size, rank, list(FEW))
