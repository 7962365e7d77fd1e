"""The dense path: AdamW, by torch's own kernels, for whatever is not on the low-rank path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from dist_lowrank.optim.options import check_betas, check_number
from dist_lowrank.optim.rounding import RandomBits, store_weight
from dist_lowrank.sharding.layouts import local


@dataclass(frozen=True, slots=True)
class DenseOptions:
    """Options of AdamW for the dense parameters of one group."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    prefix: str = ""  # of the options' names in errors
    weight_rounding: str = "nearest"
    seed: int = 0  # of stochastic rounding

    def __post_init__(self) -> None:
        check_betas(f"{self.prefix}betas", self.betas)
        check_number(f"{self.prefix}eps", self.eps)
        check_number("weight_decay", self.weight_decay)


@dataclass(frozen=True, slots=True)
class DenseParameter:
    """A parameter on the dense path."""

    name: str
    tensor: Tensor
    flat_start: int | None  # where it begins in the parameter of which it is a flat slice; None: it is none


def arithmetic_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def local_gradient(parameter: Tensor) -> Tensor:
    """The local part of a gradient, placed as its parameter is.

    A DTensor gradient can be placed otherwise, such as a sum over ranks that is still to be made; then this is
    collective.
    """
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    return local(gradient)


def dense_state(parameter: Tensor) -> dict[str, Tensor]:
    """Zero state of AdamW, sharded like the parameter; moments in float32 (float64 for float64)."""
    dtype = arithmetic_dtype(parameter)
    device = local(parameter).device
    return {
        # On a GPU the fused kernel wants the counter there.
        "step": torch.zeros((), dtype=torch.float32, device=device if device.type == "cuda" else "cpu"),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format),
    }


def dense_waves(parameters: Sequence[DenseParameter], workspace_bytes: int) -> Iterator[list[DenseParameter]]:
    """Cuts parameters so that the copies that those of low precision need fit the workspace, at least one each."""
    wave: list[DenseParameter] = []
    used_bytes = 0
    for parameter in parameters:
        tensor, needed_bytes = parameter.tensor, 0
        if tensor.dtype != arithmetic_dtype(tensor):
            needed_bytes = 2 * local(tensor).numel() * arithmetic_dtype(tensor).itemsize
        if wave and used_bytes + needed_bytes > workspace_bytes:
            yield wave
            wave, used_bytes = [], 0
        wave.append(parameter)
        used_bytes += needed_bytes
    if wave:
        yield wave


def dense_step(
    parameters: Sequence[DenseParameter], states: Sequence[dict[str, Tensor]], options: DenseOptions
) -> None:
    """One step of AdamW (arXiv 1711.05101) for parameters of one group that have gradients.

    Works on local tensors: AdamW is element-wise. Parameters of less than float32 are updated in float32 and rounded.
    """
    weights = [local(parameter.tensor.detach()) for parameter in parameters]
    # The fused kernel walks memory without regard to strides: it gets contiguous tensors, the weight itself if it can.
    wide = [weight.to(arithmetic_dtype(weight)).contiguous() for weight in weights]
    gradients = [local_gradient(p.tensor).to(w.dtype).contiguous() for p, w in zip(parameters, wide, strict=True)]
    adamw(
        wide,
        gradients,
        [local(state["exp_avg"]) for state in states],
        [local(state["exp_avg_sq"]) for state in states],
        [],
        [state["step"] for state in states],
        fused=all(weight.device.type in ("cpu", "cuda") for weight in weights),
        amsgrad=False,
        beta1=options.betas[0],
        beta2=options.betas[1],
        lr=float(options.lr),
        weight_decay=options.weight_decay,
        eps=options.eps,
        maximize=False,
    )
    for parameter, weight, updated, state in zip(parameters, weights, wide, states, strict=True):
        if updated is not weight:
            step = int(state["step"]) if options.weight_rounding == "stochastic" else 0  # on a GPU it waits for it
            random = RandomBits(options.seed, parameter.name, step)
            store_weight(parameter.tensor, updated, options.weight_rounding, random, parameter.flat_start)
