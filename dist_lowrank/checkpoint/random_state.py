"""The state of the random number generators, as tensors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of torch, Python and numpy in this process. A cached normal deviate that is not there is NaN."""
    _, integers, cached = random.getstate()
    numpy_state: Any = np.random.get_state()
    _, keys, position, has_cached, numpy_cached = numpy_state
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(integers, dtype=torch.int64),
        "python_cached": torch.tensor(float("nan") if cached is None else cached, dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_cached], dtype=torch.int64),
        "numpy_cached": torch.tensor(numpy_cached, dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Continues as the process that `random_state` was called in would have."""
    cached = float(state["python_cached"])
    random.setstate((3, tuple(state["python"].tolist()), None if cached != cached else cached))
    *keys, position, has_cached = state["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(keys, dtype=np.uint32), position, has_cached, float(state["numpy_cached"]))
    )
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
