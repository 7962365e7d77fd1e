"""Counts what a piece of code sends: every c10d call, with its number of elements."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CountCollectives(TorchDispatchMode):
    """Records `(operation, elements)` of each collective inside the context, such as `("allreduce_", 96)`.

    The elements of an operation are those of the tensors that it sends (for gathers, this rank's part); `sent_bytes`
    are their bytes, call by call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self.sent_bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            sent = args[1] if name.startswith(("allgather", "_allgather", "_reduce_scatter", "alltoall")) else args[0]
            tensors = [leaf for leaf in tree_leaves(sent) if isinstance(leaf, torch.Tensor)]
            self.calls.append((name, sum(tensor.numel() for tensor in tensors)))
            self.sent_bytes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        return func(*args, **(kwargs or {}))
