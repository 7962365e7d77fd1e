"""Steps that a CUDA graph can hold: the host decides nothing that is another at the next step.

With `capturable=True` step counters are on the device, and so is what follows from them (bias correction) and from a
learning rate that is a tensor there. On the host every step is `LATER_STEP`: whether one is the first changes nothing,
as state begins with zeros, and matrices choose at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.optim.options import check_choice, refuse

LATER_STEP = 2  # stands for all

_REFUSED: dict[str, tuple[object, ...]] = {
    "dictionary": ("shared",),  # changes at some steps
    "selection": ("previous",),  # begins otherwise than it goes on
    "kernels": ("triton",),  # take the host's numbers
    "moment_dtype": (torch.int8,),  # rounded by random numbers of the step
    "weight_rounding": ("stochastic",),
}


def check_capturable(group: Mapping[str, Any], verify_every: int, agree_on_gradients: bool) -> None:
    """Raises ValueError for options of a parameter group that make a step other than the next."""
    check_choice("capturable", group["capturable"], (False, True))
    if not group["capturable"]:
        return
    if group.get("refresh_interval", 1) != 1:
        # Nobody but the host can choose between two sets of operators, and it does not know the step.
        raise refuse("capturable", True, f"False with refresh_interval={group['refresh_interval']}, True with 1")
    for name, values in _REFUSED.items():
        if group.get(name) in values:
            raise refuse("capturable", True, f"False with {name}={group[name]!r}")
    if verify_every or agree_on_gradients:
        raise refuse(
            "capturable",
            True,
            f"with verify_every=0 and agree_on_gradients=False, for which the host need not wait (here {verify_every}, "
            f"{agree_on_gradients})",
        )


def check_rate(rate: float | Tensor, parameter: Tensor) -> None:
    """Raises ValueError for a learning rate that a graph of a step of this parameter would not read."""
    if isinstance(rate, Tensor) and rate.device != parameter.device:
        raise refuse("lr", rate, f"a number, or a tensor on {parameter.device}, with capturable=True")


def refuse_capture(groups: list[dict[str, Any]]) -> None:
    """Raises RuntimeError where a graph is being captured that would repeat the numbers of this step."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if capturing and not all(group.get("capturable", False) for group in groups):
        raise RuntimeError("step() is captured in a CUDA graph; allowed: with capturable=True (DCTAdamW, Trion)")
