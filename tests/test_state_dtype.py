"""`state_dtype="weights"` keeps state in the dtype of the weights, as published code does; arithmetic stays fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import initial_weight, prescribed_gradients
from torch import nn

from dist_lowrank.optim import Apollo, DCTAdamW, Fira, Frugal, GaLore, LDAdam, Trion

STEPS = 8
SHAPES: dict[str, tuple[int, ...]] = {"tall": (14, 6), "wide": (8, 12), "bias": (5,), "kernel": (2, 3, 4)}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dct_adamw": (DCTAdamW, {"error_feedback": "bf16"}),
    "trion": (Trion, {}),
    "galore": (GaLore, {"refresh_interval": 3}),
    "fira": (Fira, {"refresh_interval": 3}),
    "frugal": (Frugal, {"refresh_interval": 3}),
    "frugal_blocks": (Frugal, {"refresh_interval": 3, "subspace": "blocks"}),
    "apollo": (Apollo, {"refresh_interval": 3}),
    "ldadam": (LDAdam, {}),
}


def _parameters(dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(initial_weight(shape).to(dtype))) for name, shape in SHAPES.items()]


def _feed(optimizer: Any, parameters: list[tuple[str, nn.Parameter]], step: int) -> None:
    for index, (_, parameter) in enumerate(parameters):
        gradient = prescribed_gradients(tuple(parameter.shape), STEPS, seed=index)[step]
        parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()


def _numbers(optimizer: Any) -> dict[tuple[int, str], torch.Tensor]:
    """The floating-point state that grows with the matrix, by position of the parameter and name."""
    return {
        (index, key): value
        for index, state in enumerate(optimizer.state.values())
        for key, value in state.items()
        if value.is_floating_point() and key not in ("step", "residual_norm")
    }


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_a_state_in_fp32_that_is_rounded_after_each(method: str) -> None:
    make, options = METHODS[method]
    narrow, wide = (_parameters(torch.bfloat16) for _ in range(2))
    kept = make(narrow, lr=0.01, rank=3, state_dtype="weights", **options)
    rounded = make(wide, lr=0.01, rank=3, **options)
    for step in range(STEPS):
        _feed(kept, narrow, step)
        _feed(rounded, wide, step)
        for tensor in _numbers(rounded).values():
            tensor.copy_(tensor.bfloat16())
        for (name, left), (_, right) in zip(narrow, wide, strict=True):
            assert torch.equal(left, right), f"{name}, step {step}"
    assert {tensor.dtype for tensor in _numbers(kept).values()} == {torch.bfloat16}
    for place, tensor in _numbers(kept).items():
        assert torch.equal(tensor.float(), _numbers(rounded)[place].float()), place


def test_it_changes_nothing_for_weights_in_fp32_and_fp64() -> None:
    for dtype in (torch.float32, torch.float64):
        first, second = _parameters(dtype), _parameters(dtype)
        left, right = GaLore(first, rank=3, state_dtype="weights"), GaLore(second, rank=3)
        for step in range(3):
            _feed(left, first, step)
            _feed(right, second, step)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))
        assert {tensor.dtype for tensor in _numbers(left).values()} == {dtype}


def test_a_norm_that_is_limited_stays_in_fp32() -> None:
    """In bf16 a growth by one percent is lost or doubled."""
    parameters = _parameters(torch.bfloat16)
    updater = Fira(parameters, rank=3, state_dtype="weights")
    _feed(updater, parameters, 0)
    assert updater.state[parameters[0][1]]["residual_norm"].dtype == torch.float32


def test_state_is_loaded_as_it_was_kept_or_refused() -> None:
    parameters, others = _parameters(torch.bfloat16), _parameters(torch.bfloat16)
    source = GaLore(parameters, rank=3, state_dtype="weights")
    _feed(source, parameters, 0)
    target = GaLore(others, rank=3, state_dtype="weights")
    target.load_state_dict(source.state_dict())
    for place, tensor in _numbers(source).items():
        assert torch.equal(_numbers(target)[place], tensor)
        assert _numbers(target)[place].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="state_dtype: the saved state of parameter group 0 has 'weights', this"):
        GaLore(others, rank=3).load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="state_dtype: 'bf16' is not allowed; allowed: None, weights"):
        GaLore(parameters, rank=3, state_dtype="bf16")
