"""What of a training is saved, and how it lies on the ranks: what a strategy has to say of itself."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_lowrank.checkpoint.shards import Shard, shard_of
from dist_lowrank.optim.binding import canonical_name
from dist_lowrank.optim.dormant import sleep, wake
from dist_lowrank.optim.engine import LowRankOptimizer


class TrainingState(Protocol):
    """Weights and optimizer state under the same names and global shapes whatever the strategy. All collective."""

    def to_save(self) -> dict[str, Shard]:
        """What this rank holds now; every element is held by at least one rank, and no two copies differ."""

    def to_load(self, *, weights_only: bool) -> dict[str, Shard]:
        """What this rank needs, to be filled; then call `loaded`."""

    def loaded(self) -> None:
        """Puts what was filled where training finds it."""


class NativeState:
    """Of a model whose parameters are plain tensors, the same on all ranks, or DTensors."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def to_save(self) -> dict[str, Shard]:
        tensors = model_tensors(self.model)
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                state = state_of(self.optimizer, parameter)
                tensors |= {f"optimizer.{canonical_name(name)}.{key}": value for key, value in state.items()}
        return {name: shard_of(tensor) for name, tensor in tensors.items()}

    def to_load(self, *, weights_only: bool) -> dict[str, Shard]:
        if weights_only:
            return {name: shard_of(tensor) for name, tensor in model_tensors(self.model).items()}
        wake_state(self.optimizer)
        return self.to_save()  # filled in place

    def loaded(self) -> None:
        let_state_sleep(self.optimizer)


def wake_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives all of the optimizer's state memory, so that it can be filled."""
    if isinstance(optimizer, LowRankOptimizer):
        for tensor in optimizer.resting_state():
            wake(tensor)


def let_state_sleep(optimizer: torch.optim.Optimizer) -> None:
    """Takes back the memory of state that was filled with zeros, where the optimizer needs none for them."""
    if isinstance(optimizer, LowRankOptimizer):
        for tensor in optimizer.resting_state():
            if not tensor.any():
                sleep(tensor)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and persistent buffers."""
    weights = dict(model.named_parameters())
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in aliases}
    return {f"model.{canonical_name(name)}": value for name, value in (weights | buffers).items()}


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The optimizer's state of a parameter; torch's AdamW makes its own at the first step, so it may be made here."""
    state: dict[str, Any] = optimizer.state[parameter]
    if not state and isinstance(optimizer, torch.optim.AdamW):
        on_device = bool(optimizer.defaults.get("fused")) and parameter.device.type == "cuda"
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        state |= {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
    return state
