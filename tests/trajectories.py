"""Driving optimizers with prescribed gradients, and comparing what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import pytest
import torch
from references import (
    ReferenceDCTAdamW,
    ReferenceTrion,
    compresses_columns,
    initial_weight,
    prescribed_gradients,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dist_lowrank.dictionaries import columns
from dist_lowrank.optim import DCTAdamW, Dion, Dion3, Muon, Trion

# Tall, wide, square, one row, one column.
SHAPES = [(24, 10), (10, 24), (12, 12), (1, 9), (9, 1)]
# The same, with an even number as the shorter side: one block, blocks of 2, blocks of 4.
SHAPES_FOR_HADAMARD = [(24, 8), (10, 24), (12, 12), (1, 9), (9, 1)]


class Reference(Protocol):
    weight: Tensor

    def step(self, gradient: Tensor) -> None: ...


def make_parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Parameter]:
    """One parameter per shape, the same values at every call."""
    return [Parameter(initial_weight(shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]


def make_gradients(shapes: Sequence[tuple[int, ...]], steps: int) -> list[list[Tensor]]:
    """Float64 gradients: one list per step, one tensor per shape."""
    per_parameter = [prescribed_gradients(shape, steps, seed=i) for i, shape in enumerate(shapes)]
    return [list(step) for step in zip(*per_parameter, strict=True)]


def feed(optimizer: Optimizer, parameters: Sequence[Parameter], gradients: Sequence[Tensor | None]) -> None:
    """One step with these gradients."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.to(parameter.dtype).clone()
    optimizer.step()


def train(optimizer: Optimizer, parameters: Sequence[Parameter], steps: int, skip: int = 0) -> None:
    """Steps `skip`..`steps` of the prescribed gradients of these shapes."""
    for gradients in make_gradients([tuple(p.shape) for p in parameters], steps)[skip:]:
        feed(optimizer, parameters, gradients)


def assert_equals_references(
    optimizer: Optimizer,
    parameters: Sequence[Parameter],
    references: Sequence[Reference],
    *,
    steps: int = 20,
    tolerance: float = 1e-10,
) -> None:
    """After every step, every parameter equals its reference."""
    for t, gradients in enumerate(make_gradients([tuple(p.shape) for p in parameters], steps), start=1):
        feed(optimizer, parameters, gradients)
        for parameter, reference, gradient in zip(parameters, references, gradients, strict=True):
            reference.step(gradient)
            difference = (parameter.detach().double() - reference.weight).abs().max().item()
            assert difference <= tolerance, f"shape {tuple(parameter.shape)}, step {t}: off by {difference}"


def reference_dictionary(name: str, shape: tuple[int, int], side: str, seed: int = 0) -> str | Tensor:
    """What the references take as dictionary. `random` alone has no formula; its orthonormality is tested apart."""
    if name != "random":
        return name
    return columns("random", shape[1] if compresses_columns(shape, side) else shape[0], seed=seed)


def tensors_of(state_dict: dict[str, Any]) -> dict[tuple[int, str], Tensor]:
    """The tensors of an optimizer's state dict by (parameter index, name)."""
    return {(index, name): value for index, entry in state_dict["state"].items() for name, value in entry.items()}


def assert_bitwise_equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), f"tensor {i} differs by {(a.double() - b.double()).abs().max()}"


# Both optimizers, for tests of what they have in common.
KINDS: dict[str, tuple[type[Optimizer], type, dict[str, Any]]] = {
    "dct_adamw": (DCTAdamW, ReferenceDCTAdamW, {"lr": 0.02, "weight_decay": 0.1, "rank": 3, "refresh_interval": 2}),
    "trion": (Trion, ReferenceTrion, {"lr": 0.02, "weight_decay": 0.1, "rank": 3}),
}
# Those that orthogonalise whole matrices, for tests that need no reference and no option of columns.
WHOLE_KINDS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "muon": (Muon, {"lr": 0.02, "weight_decay": 0.1}),
    "dion": (Dion, {"lr": 0.02, "weight_decay": 0.1, "rank": 3}),
    "dion3": (Dion3, {"lr": 0.02, "weight_decay": 0.1, "rank": 3}),
}
# Two matrices and two dense tensors.
MIXED_SHAPES = [(8, 6), (4, 10), (6,), (2, 3, 4)]

both = pytest.mark.parametrize("kind", KINDS)
each = pytest.mark.parametrize("kind", [*KINDS, *WHOLE_KINDS])


def make(kind: str, parameters: Any, **options: Any) -> Any:
    """An optimizer of this kind with options that exercise it."""
    if kind in WHOLE_KINDS:
        whole_class, of_whole = WHOLE_KINDS[kind]
        return whole_class(parameters, **of_whole | options)
    optimizer_class, _, defaults = KINDS[kind]
    return optimizer_class(parameters, **defaults | options)


def references_of(kind: str, parameters: Sequence[Parameter], **options: Any) -> list[Any]:
    """The references of `make` with the same options."""
    _, reference_class, defaults = KINDS[kind]
    return [reference_class(p, **defaults | options) for p in parameters]
