"""Checks of optimizer options; each error names the option, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# What only groups say: which parameters are matrices, and of which matrices they consist.
PATH_OPTIONS = {"low_rank": True, "higher_dims": "dense", "split": None, "split_dim": 0, "role": None}
# Of the engine, not of a parameter group.
ENGINE_OPTIONS = ("process_group", "workspace_bytes", "verify_every", "agree_on_gradients")


def refuse(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{name}: {value!r} is not allowed; allowed: {allowed}")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        raise refuse(name, value, ", ".join(str(choice) for choice in allowed))


def check_number(name: str, value: Any, *, below: float = math.inf) -> None:
    """A finite number >= 0 and < `below`. One-element tensors count as numbers."""
    upper = "" if below == math.inf else f" and < {below:g}"
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and 0 <= number < below):
        raise refuse(name, value, f"a number >= 0{upper}")


def check_positive(name: str, value: Any) -> None:
    check_number(name, value)
    if not value:
        raise refuse(name, value, "a number > 0")


def check_decay(name: str, value: Any) -> None:
    """The exponent of `1 - t^value`, which has to stay between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value <= 0:
        raise refuse(name, value, "a number <= 0")


def check_betas(name: str, value: Any) -> None:
    try:
        first, second = value
        check_number(name, first, below=1)
        check_number(name, second, below=1)
    except (TypeError, ValueError):
        raise refuse(name, value, "two numbers >= 0 and < 1") from None


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise refuse(name, value, "an integer >= 1")


def check_rank(value: Any) -> None:
    """An integer is a number of columns, a float a fraction of n."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return
    if isinstance(value, float) and 0 < value <= 1:
        return
    raise refuse("rank", value, "an integer >= 1 (columns) or a float > 0 and <= 1 (fraction of n)")


def check_path_options(group: Mapping[str, Any]) -> None:
    """Of `PATH_OPTIONS`, all but `low_rank`."""
    check_choice("state_dtype", group.get("state_dtype"), (None, "weights"))
    check_choice("higher_dims", group["higher_dims"], ("dense", "stack", "flatten"))
    if group["split_dim"] not in (0, 1):
        raise refuse("split_dim", group["split_dim"], "0, 1")
    sizes = group["split"]
    if sizes is not None and not (isinstance(sizes, (list, tuple)) and sizes):
        raise refuse("split", sizes, "None, or a list of sizes")
    if group["role"] is not None and not (isinstance(group["role"], str) and group["role"]):
        raise refuse("role", group["role"], "None, or a name")
    for size in sizes or ():
        check_count("split", size)


def dense_rate(group: dict[str, Any]) -> float | Tensor:
    """`dense_lr`, in proportion to what a scheduler has made of `lr` since the group was added."""
    if "base_lr" not in group:  # a tensor is read once
        group["base_lr"] = float(group.get("initial_lr", group["lr"]))
    base_lr = group["base_lr"]
    if group.get("capturable") and isinstance(group["lr"], Tensor) and base_lr:
        return torch.mul(group["lr"], group["dense_lr"] / base_lr)
    return float(group["dense_lr"] * (float(group["lr"]) / base_lr if base_lr else 1.0))
