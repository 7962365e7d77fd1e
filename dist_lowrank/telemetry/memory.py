"""Memory by cause: how many bytes this rank holds, and for what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def memory_by_cause(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Bytes that this rank holds now, by cause.

    Causes are disjoint. What is counted are storages, each once: tied weights once, gradients that are views of one
    bucket with the bucket, shards with the padding that they are stored with. DTensors count with their local part.

    Args:
        model: Its parameters and their gradients are counted. Gradients show only while they are there: call this
            between `backward` and `zero_grad`.
        optimizer: One with a method `memory_bytes() -> dict[str, int]` accounts for its state itself. The state of
            any other counts as `dense_moments`.

    Returns:
        `parameters`, `gradients`, and the optimizer's causes (`dist_lowrank.telemetry.causes`). Where the model is on
        a GPU also what `allocator_bytes` says.
    """
    return bytes_by_cause(model_tensors(model), optimizer)


def model_tensors(model: nn.Module) -> dict[str, list[Tensor]]:
    """Parameters and the gradients that are there."""
    parameters: list[Tensor] = list(model.parameters())
    return {"parameters": parameters, "gradients": [p.grad for p in parameters if p.grad is not None]}


def state_tensors(optimizer: Optimizer) -> dict[str, list[Tensor]]:
    """By cause; of an optimizer that does not tell its causes, all as `dense_moments`."""
    if callable(account := getattr(optimizer, "memory_tensors", None)):
        by_cause: dict[str, list[Tensor]] = account()
        return by_cause
    values = (value for state in optimizer.state.values() for value in state.values())
    return {"dense_moments": [value for value in values if isinstance(value, Tensor)]}


def bytes_by_cause(tensors: Mapping[str, Iterable[Tensor]], optimizer: Optimizer) -> dict[str, int]:
    """`memory_by_cause` where parameters and gradients do not lie in the model: tensors by cause, `parameters` first.

    A storage that has several causes counts for the first.
    """
    counted: set[tuple[torch.device, int]] = set()
    by_cause: dict[str, int] = {}
    device = None
    for cause, members in tensors.items():
        members = list(members)
        by_cause[cause] = storage_bytes(members, counted)
        device = device or next((p.device for p in members if p.device.type == "cuda"), None)
    if callable(account := getattr(optimizer, "memory_bytes", None)):
        by_cause |= account()
    else:
        by_cause |= {cause: storage_bytes(each, counted) for cause, each in state_tensors(optimizer).items()}
    return by_cause | (allocator_bytes(device) if device is not None else {})


def allocator_bytes(device: torch.device) -> dict[str, int]:
    """What torch's allocator says about a GPU now.

    Returns:
        `fragmentation`: what it has reserved and not given out; `outside_allocator`: what is used of the device beside
        that, by the driver, by NCCL and by other processes; and `allocator_peak`, which is no cause but the most that
        it has given out at once.
    """
    reserved = torch.cuda.memory_reserved(device)
    free, capacity = torch.cuda.mem_get_info(device)
    return {
        "fragmentation": reserved - torch.cuda.memory_allocated(device),
        "outside_allocator": capacity - free - reserved,
        "allocator_peak": torch.cuda.max_memory_allocated(device),
    }


def storage_bytes(tensors: Iterable[Tensor], counted: set[tuple[torch.device, int]]) -> int:
    """Bytes of the tensors' local storages that are not yet in `counted`; adds them to it."""
    total_bytes = 0
    for tensor in tensors:
        local = tensor.detach()
        if isinstance(local, DTensor):
            local = local.to_local()
        storage = local.untyped_storage()
        key = (local.device, storage.data_ptr())
        if key not in counted:
            counted.add(key)
            total_bytes += storage.nbytes()
    return total_bytes
