"""Saving and loading of optimizer state: dtypes kept, shards understood, nothing half-loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_lowrank.optim.dormant import is_dormant, wake
from dist_lowrank.sharding.layouts import local, local_part

# Options that give stored numbers their meaning; the shapes of the state tell the rest (rank, residual).
STRUCTURAL_OPTIONS = (
    "dictionary",
    "subspace",
    "residual",
    "bias_correction",
    "side",
    "moment_dtype",
    "state_dtype",
    "error_feedback",
    "selection",
    "low_rank",
    "higher_dims",
    "split",
    "split_dim",
    "role",
)


def validate_state_dict(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]], incoming: Mapping[str, Any]
) -> None:
    """Raises ValueError unless the state of every parameter in `incoming` fits the state at hand."""
    saved_groups = incoming["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
        return  # torch's own error says it
    for number, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        drawn = {group.get("dictionary"), group.get("subspace")} & {
            "random",
            "gaussian",
            "stiefel",
            "coordinates",
            "blocks",
        }
        options = STRUCTURAL_OPTIONS + (("seed",) if drawn else ())
        for option in options:
            if option in group and option in saved_group and _plain(group[option]) != _plain(saved_group[option]):
                raise ValueError(
                    f"{option}: the saved state of parameter group {number} has {saved_group[option]!r}, this "
                    f"optimizer has {group[option]!r}; allowed: the same"
                )
        names = group.get("param_names") or [f"number {index}" for index in saved_group["params"]]
        for name, parameter, index in zip(names, group["params"], saved_group["params"], strict=True):
            if state.get(parameter):  # frozen parameters have none
                _validate_parameter(name, state[parameter], incoming["state"].get(index, {}))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # files know no tuples


def _validate_parameter(name: str, kept: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    if set(kept) != set(saved):
        raise ValueError(
            f"parameter {name!r}: the saved state has {sorted(saved) or 'nothing'}, this optimizer needs {sorted(kept)}"
        )
    for key, tensor in kept.items():
        found = saved[key]
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != tuple(tensor.shape):
            raise ValueError(
                f"parameter {name!r}: the saved {key!r} has shape {shape}, this optimizer needs {tuple(tensor.shape)}"
            )
        if isinstance(found, DTensor) and (
            not isinstance(tensor, DTensor)
            or found.placements != tensor.placements
            or local(found).shape != local(tensor).shape
        ):
            raise ValueError(
                f"parameter {name!r}: the saved {key!r} is sharded otherwise than this optimizer's; save with "
                "`full_state_dict`, or through torch.distributed.checkpoint, which re-shards"
            )


@torch.no_grad()
def load_into(
    parameters: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> None:
    """Copies validated state, by position, into the tensors at hand."""
    for position, parameter in enumerate(parameters):
        for key, tensor in state.get(parameter, {}).items():
            value = saved[position][key]
            if isinstance(tensor, DTensor) and not isinstance(value, DTensor):
                value = local_part(value, tensor.device_mesh, tensor.placements)
            if is_dormant(local(tensor)):
                if not bool(local(value).any()):
                    continue
                wake(local(tensor))
            local(tensor).copy_(local(value))


def writable_if_fresh(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter that made no step yet, with memory for all of it: checkpoints are read into it.

    (torch.distributed.checkpoint writes into the tensors of the state dict at hand, before anybody knows whose turn it
    is.) What sleeps after a step stays so.
    """
    if any(bool(value) for key, value in state.items() if key.endswith("step")):
        return state
    return {key: torch.zeros_like(value) if is_dormant(local(value)) else value for key, value in state.items()}


def full_state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with every sharded tensor gathered, as one process would have it. Collective.

    All ranks have to call it, and all get the whole. `load_state_dict` takes the result at any world size, and, for
    flat tensors, with any cuts.
    """
    state_dict = optimizer.state_dict()
    gather: Any = getattr(optimizer, "gather_flat_state", None)
    flat = gather(optimizer.state) if gather is not None else {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    positions = [index for group in state_dict["param_groups"] for index in group["params"]]
    of_index = dict(zip(positions, parameters, strict=True))
    state_dict["state"] = {
        index: flat.get(of_index[index]) or {key: _full(value) for key, value in tensors.items()}
        for index, tensors in state_dict["state"].items()
    }
    return state_dict


def _full(value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value.clone()
    if value.dtype == torch.int16:  # which gloo does not send
        return value.to(torch.int32).full_tensor().to(torch.int16)  # type: ignore[attr-defined]
    return value.full_tensor()
