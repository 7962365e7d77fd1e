"""Memory by cause: how many bytes this rank holds, and for what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
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
        `parameters`, `gradients`, and the optimizer's causes: some of `moments`, `dense_moments`, `indices`,
        `projection`, `shared_dictionary`, `error_feedback`, `dictionary`, `other_state`. Where the model is on a GPU
        also `allocator_peak`, which is not a cause but the most that torch's allocator has held at once, activations
        and workspace included.
    """
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    return bytes_by_cause({"parameters": parameters, "gradients": gradients}, optimizer)


def bytes_by_cause(tensors: Mapping[str, Iterable[torch.Tensor]], optimizer: Optimizer) -> dict[str, int]:
    """`memory_by_cause` where parameters and gradients do not lie in the model: tensors by cause, `parameters` first.

    A storage that has several causes counts for the first.
    """
    counted: set[tuple[torch.device, int]] = set()
    by_cause: dict[str, int] = {}
    device = None
    for cause, members in tensors.items():
        members = list(members)
        by_cause[cause] = _storage_bytes(members, counted)
        device = device or next((p.device for p in members if p.device.type == "cuda"), None)
    if callable(account := getattr(optimizer, "memory_bytes", None)):
        by_cause |= account()
    else:
        states = (value for state in optimizer.state.values() for value in state.values())
        by_cause["dense_moments"] = _storage_bytes((v for v in states if isinstance(v, torch.Tensor)), counted)
    if device is not None:
        by_cause["allocator_peak"] = torch.cuda.max_memory_allocated(device)
    return by_cause


def _storage_bytes(tensors: Iterable[torch.Tensor], counted: set[tuple[torch.device, int]]) -> int:
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
