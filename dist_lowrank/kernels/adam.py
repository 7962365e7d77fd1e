"""Adam's moments and direction in one pass over memory, by torch's own fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

_FUSED_DEVICES = ("cpu", "cuda", "meta")


def adam_direction(
    coefficients: Tensor, mean: Tensor, square: Tensor, step: int | Tensor, betas: tuple[float, float], eps: float
) -> Tensor:
    """Moves the moments in place and returns `(m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)`.

    Args:
        coefficients: any shape, float32 or float64; may be overwritten by the result.
        mean, square: the moments, of the same shape and dtype.
        step: t, from 1; or a tensor () on the device, float32.
    """
    beta1, beta2 = betas
    contiguous = coefficients.is_contiguous() and mean.is_contiguous() and square.is_contiguous()
    fused = contiguous and coefficients.device.type in _FUSED_DEVICES
    if not fused or torch.compiler.is_compiling():  # which fuses by itself, and cannot trace the kernel
        step = step.double() if isinstance(step, Tensor) else step
        mean.lerp_(coefficients, 1 - beta1)
        square.mul_(beta2).addcmul_(coefficients, coefficients, value=1 - beta2)
        return (mean / (1 - beta1**step)).div_((square / (1 - beta2**step)).sqrt_().add_(eps))
    # AdamW on the coefficients as weights and gradients at once: with -1 for learning rate and decay, weights decay to
    # nothing, and what is added to them is the direction. Eight passes and all temporaries less; the kernel reads the
    # step on the device, so that nobody waits for it.
    count = step if isinstance(step, Tensor) else torch.full((), float(step), device=coefficients.device)
    torch._fused_adamw_(
        [coefficients],
        [coefficients],
        [mean],
        [square],
        [],
        [count],
        lr=-1.0,
        beta1=beta1,
        beta2=beta2,
        weight_decay=-1.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    return coefficients
