"""State that is zero for now and takes no memory: tensors of their full shape that all look at one zero."""

from __future__ import annotations

import torch
from torch import Tensor


def dormant_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros with one element of storage; not to be written to."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def is_dormant(tensor: Tensor) -> bool:
    return tensor.numel() > 1 and tensor.untyped_storage().nbytes() == tensor.element_size()


def wake(tensor: Tensor) -> None:
    """Gives a dormant tensor memory, in place; it stays zero."""
    if is_dormant(tensor):
        tensor.set_(torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device))  # type: ignore[call-overload]


def sleep(tensor: Tensor) -> None:
    """Drops the memory of a tensor, in place; it is zero then."""
    if not is_dormant(tensor):
        tensor.set_(dormant_zeros(tuple(tensor.shape), tensor.dtype, tensor.device))  # type: ignore[call-overload]
