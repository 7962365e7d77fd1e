"""The dense path: AdamW, by torch's own kernels, for whatever is not on the low-rank path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
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
        check_number(f"{self.prefix}lr", self.lr)
        check_betas(f"{self.prefix}betas", self.betas)
        check_number(f"{self.prefix}eps", self.eps)
        check_number("weight_decay", self.weight_decay)


def arithmetic_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


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


def dense_step(
    parameters: Sequence[Tensor], states: Sequence[dict[str, Tensor]], names: Sequence[str], options: DenseOptions
) -> None:
    """One step of AdamW (arXiv 1711.05101) for parameters of one group that have gradients.

    Works on local tensors: AdamW is element-wise. Parameters of less than float32 are updated in float32 and rounded.
    """
    weights = [local(parameter.detach()) for parameter in parameters]
    # The fused kernel walks memory without regard to strides: it gets contiguous tensors, the weight itself if it can.
    wide = [weight.to(arithmetic_dtype(weight)).contiguous() for weight in weights]
    gradients = [local(p.grad).to(w.dtype).contiguous() for p, w in zip(parameters, wide, strict=True)]  # type: ignore[arg-type]
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
    for parameter, weight, updated, state, name in zip(parameters, weights, wide, states, names, strict=True):
        if updated is not weight:
            step = int(state["step"]) if options.weight_rounding == "stochastic" else 0  # on a GPU it waits for it
            store_weight(parameter, updated, options.weight_rounding, RandomBits(options.seed, name, step))
