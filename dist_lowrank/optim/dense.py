"""The dense path: AdamW, by torch's own kernels, for whatever is not on the low-rank path."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from dist_lowrank.optim.options import check_betas, check_number, dense_rate
from dist_lowrank.optim.rounding import RandomBits, store_weight
from dist_lowrank.sharding.layouts import global_offset, local
from dist_lowrank.sharding.pieces import Piece


@dataclass(frozen=True, slots=True)
class DenseOptions:
    """Options of AdamW for the dense parameters of one group."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    prefix: str = ""  # of the options' names in errors
    weight_rounding: str = "nearest"
    seed: int = 0  # of stochastic rounding
    capturable: bool = False  # see `dist_lowrank.optim.capturable`

    def __post_init__(self) -> None:
        check_betas(f"{self.prefix}betas", self.betas)
        check_number(f"{self.prefix}eps", self.eps)
        check_number("weight_decay", self.weight_decay)


def dense_options(group: dict[str, Any], *, of_its_own: bool) -> DenseOptions:
    """Of AdamW, from the options of a parameter group.

    Args:
        of_its_own: the group has `dense_` options; else those of the low-rank path hold here too.
    """
    both = {key: group[key] for key in ("weight_decay", "weight_rounding", "seed")}
    both["capturable"] = group.get("capturable", False)
    if not of_its_own:
        return DenseOptions(group["lr"], group["betas"], group["eps"], **both)
    rate = dense_rate(group) if "dense_lr" in group else group["lr"]
    return DenseOptions(rate, group["dense_betas"], group["dense_eps"], prefix="dense_", **both)


@dataclass(frozen=True, slots=True)
class DenseParameter:
    """A parameter on the dense path, or a piece of one."""

    piece: Piece
    tensor: Tensor  # the parameter
    flat_group: dist.ProcessGroup | None = None  # the ranks among which a flat tensor's pieces are cut

    @property
    def offset(self) -> tuple[int, ...]:
        """Where this rank's part begins: per dimension, or, for a flat slice, the element."""
        if self.flat_group is not None:
            return (self.piece.flat[self.flat_group.rank()].start,)
        return global_offset(self.tensor)

    def state(self, of_parameter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's tensors of this piece, out of the state of its parameter."""
        return {key: local(of_parameter[self.piece.prefix + key]) for key in ("step", "exp_avg", "exp_avg_sq")}


def arithmetic_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def state_dtype(parameter: Tensor, choice: str | None) -> torch.dtype:
    """In which state is kept where nothing else is said: that of the arithmetic, or, for "weights", the parameter's."""
    return parameter.dtype if choice == "weights" else arithmetic_dtype(parameter)


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Of its gradient, the same on all ranks; torch lets a parameter have another than its own."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def local_gradient(parameter: Tensor) -> Tensor:
    """The local part of a gradient, placed as its parameter is; zeros where only other ranks have one.

    A DTensor gradient can be placed otherwise, such as a sum over ranks that is still to be made; then this is
    collective.
    """
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(local(parameter.detach()), dtype=gradient_dtype(parameter))
    if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    return local(gradient)


def local_gradients(pieces: Sequence[tuple[Tensor, Piece]]) -> list[Tensor]:
    """Of the parameter of each piece: the local part of its gradient, the same for all of its pieces.

    Contiguous where pieces are views.
    """
    by_parameter: dict[int, Tensor] = {}
    for parameter, piece in pieces:
        if id(parameter) not in by_parameter:
            gradient = local_gradient(parameter)
            by_parameter[id(parameter)] = gradient if piece.whole else gradient.contiguous()
    return [by_parameter[id(parameter)] for parameter, _ in pieces]


def copies_bytes(parameters: Sequence[DenseParameter]) -> float:
    """What a step on these holds: nothing, or, where some are converted for the arithmetic, as much as there is.

    (Which parts are larger differs between ranks, and whether something else goes on meanwhile must not.)
    """
    converted = any(each.tensor.dtype != arithmetic_dtype(each.tensor) for each in parameters)
    return math.inf if converted else 0


def dense_state(parameter: DenseParameter, dtype: torch.dtype) -> dict[str, Tensor]:
    """Zero state of AdamW, sharded like the parameter; moments in `dtype`."""
    tensor, piece = parameter.tensor, parameter.piece
    part = tensor if piece.whole else piece.view(local(tensor.detach()))
    device = local(tensor).device
    moments = {
        key: torch.zeros_like(part, dtype=dtype, memory_format=torch.contiguous_format)
        for key in ("exp_avg", "exp_avg_sq")
    }
    # On a GPU the fused kernel wants the counter there.
    step = torch.zeros((), dtype=torch.float32, device=device if device.type == "cuda" else "cpu")
    return {piece.prefix + key: value for key, value in {"step": step, **moments}.items()}


def dense_waves(parameters: Sequence[DenseParameter], workspace_bytes: int) -> Iterator[list[DenseParameter]]:
    """Cuts parameters so that the copies that those of low precision need fit the workspace, at least one each."""
    wave: list[DenseParameter] = []
    used_bytes = 0
    for parameter in parameters:
        tensor, needed_bytes = parameter.tensor, 0
        if tensor.dtype != arithmetic_dtype(tensor):
            elements = parameter.piece.view(local(tensor.detach())).numel()
            needed_bytes = 4 * elements * arithmetic_dtype(tensor).itemsize  # weight, gradient, perhaps moments
        if wave and used_bytes + needed_bytes > workspace_bytes:
            yield wave
            wave, used_bytes = [], 0
        wave.append(parameter)
        used_bytes += needed_bytes
    if wave:
        yield wave


def dense_step(
    parameters: Sequence[DenseParameter], states: Sequence[Mapping[str, Tensor]], options: DenseOptions
) -> None:
    """One step of AdamW (arXiv 1711.05101) for parameters of one group that have gradients.

    Works on local tensors: AdamW is element-wise. Parameters of less than float32 are updated in float32 and rounded,
    and so are moments, to nearest.
    """
    weights = [parameter.piece.view(local(parameter.tensor.detach())) for parameter in parameters]
    # The fused kernel walks memory without regard to strides: it gets contiguous tensors, the weight itself if it can.
    wide = [weight.to(arithmetic_dtype(weight)).contiguous() for weight in weights]
    parts = local_gradients([(parameter.tensor, parameter.piece) for parameter in parameters])
    gradients = [
        parameter.piece.view(part).to(weight.dtype).contiguous()
        for parameter, part, weight in zip(parameters, parts, wide, strict=True)
    ]
    means, squares = (
        [state[key].to(weight.dtype) for state, weight in zip(states, wide, strict=True)]
        for key in ("exp_avg", "exp_avg_sq")
    )
    adamw(
        wide,
        gradients,
        means,
        squares,
        [],
        [state["step"] for state in states],
        fused=all(weight.device.type in ("cpu", "cuda") for weight in weights),
        capturable=options.capturable,
        amsgrad=False,
        beta1=options.betas[0],
        beta2=options.betas[1],
        lr=options.lr if options.capturable else float(options.lr),
        weight_decay=options.weight_decay,
        eps=options.eps,
        maximize=False,
    )
    for state, mean, square in zip(states, means, squares, strict=True):
        for key, moment in (("exp_avg", mean), ("exp_avg_sq", square)):
            if moment is not state[key]:
                state[key].copy_(moment)
    for parameter, weight, updated, state in zip(parameters, weights, wide, states, strict=True):
        if updated is not weight:
            step = int(state["step"]) if options.weight_rounding == "stochastic" else 0  # on a GPU it waits for it
            random = RandomBits(options.seed, parameter.piece.name, step)
            store_weight(weight, updated, options.weight_rounding, random, parameter.offset, parameter.piece.shape)
