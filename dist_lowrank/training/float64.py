"""Keeping a float64 model in float64.

Models of `transformers` convert to float32 within RMSNorm and softmax, which widens bf16 and narrows float64: gradients
of a float64 LLaMA are rounded to float32, and differ by as much between numbers of processes that scale the loss by
factors that are not powers of two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def keep_float64(modules: Iterable[nn.Module]) -> None:
    """From now on nothing in the forward passes of these modules, or those within, narrows float64 to float32.

    A module that is recomputed by itself in the backward pass has to be among them.
    """
    for module in modules:
        module.forward = _within(module.forward)


def _within(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def wide(*args: Any, **kwargs: Any) -> Any:
        with _Wide():
            return forward(*args, **kwargs)

    return wide


class _Wide(TorchFunctionMode):
    """Where float32 is asked for a float64 tensor, it is float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = [_widened(each) for each in args]
            kwargs = {name: _widened(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)


def _widened(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument
