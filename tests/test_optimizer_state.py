"""State of both optimizers: saved, loaded, copied, counted; dtypes kept, misfits refused."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from trajectories import (
    MIXED_SHAPES,
    assert_bitwise_equal,
    assert_equals_references,
    both,
    each,
    make,
    make_parameters,
    references_of,
    tensors_of,
    train,
)

from dist_lowrank.optim import DCTAdamW


def state_variants() -> list[Any]:
    rich = {"error_feedback": "fp32", "column_bias_correction": True}
    return [
        pytest.param("dct_adamw", torch.float32, {}, id="dct_adamw"),
        pytest.param("dct_adamw", torch.float64, rich, id="dct_adamw-float64-error-feedback-ages"),
        pytest.param("dct_adamw", torch.bfloat16, rich, id="dct_adamw-bf16-weights"),
        pytest.param("dct_adamw", torch.float32, {"moment_dtype": torch.bfloat16}, id="dct_adamw-bf16-moments"),
        pytest.param(
            "dct_adamw",
            torch.float32,
            {"moment_dtype": torch.int8, "error_feedback": "int8", "column_bias_correction": True},
            id="dct_adamw-int8",
        ),
        pytest.param(
            "dct_adamw",
            torch.bfloat16,
            {"error_feedback": "int4", "error_feedback_momentum": True, "weight_rounding": "stochastic", "seed": 3},
            id="dct_adamw-bf16-weights-int4",
        ),
        pytest.param("dct_adamw", torch.float32, {"error_feedback": "bf16"}, id="dct_adamw-bf16-error-feedback"),
        pytest.param("trion", torch.float32, {}, id="trion"),
        pytest.param("trion", torch.bfloat16, {"weight_rounding": "stochastic"}, id="trion-bf16-weights-stochastic"),
        pytest.param("trion", torch.bfloat16, {"dictionary": "random", "seed": 3}, id="trion-bf16-weights-random"),
        pytest.param("muon", torch.float32, {}, id="muon"),
        pytest.param("muon", torch.bfloat16, {"state_dtype": "weights"}, id="muon-bf16-weights-and-state"),
        pytest.param("dion", torch.float32, {"moment_dtype": torch.bfloat16}, id="dion-bf16-moments"),
        pytest.param("dion3", torch.float64, {}, id="dion3-float64"),
    ]


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("carry", [copy.deepcopy, through_a_file], ids=["memory", "file"])
@pytest.mark.parametrize("stepped_before_load", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize(("kind", "dtype", "options"), state_variants())
def test_a_loaded_state_continues_bitwise_in_its_dtypes(
    kind: str, dtype: torch.dtype, options: dict[str, Any], stepped_before_load: bool, carry: Any
) -> None:
    parameters = make_parameters(MIXED_SHAPES, dtype)
    optimizer = make(kind, parameters, **options)
    train(optimizer, parameters, steps=5)
    saved = carry(optimizer.state_dict())
    others = make_parameters(MIXED_SHAPES, dtype)
    restored = make(kind, others, **options)
    if stepped_before_load:
        train(restored, others, steps=3)
    restored.load_state_dict(saved)
    for p, q in zip(parameters, others, strict=True):
        q.data.copy_(p.data)
    before, loaded = tensors_of(saved), tensors_of(restored.state_dict())
    assert before.keys() == loaded.keys()
    assert_bitwise_equal(list(loaded.values()), list(before.values()))

    train(optimizer, parameters, steps=10, skip=5)
    train(restored, others, steps=10, skip=5)
    assert_bitwise_equal([q.detach() for q in others], [p.detach() for p in parameters])


@each
def test_loading_takes_a_copy(kind: str) -> None:
    parameters = make_parameters(MIXED_SHAPES)
    optimizer = make(kind, parameters)
    train(optimizer, parameters, steps=2)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(tensors_of(saved))
    optimizer.load_state_dict(saved)
    train(optimizer, parameters, steps=4, skip=2)
    assert_bitwise_equal(list(tensors_of(saved).values()), list(kept.values()))


@pytest.mark.parametrize(("kind", "dtype", "options"), state_variants())
def test_state_has_the_same_tensors_before_the_first_step_as_after(
    kind: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    parameters = make_parameters(MIXED_SHAPES, dtype)
    optimizer = make(kind, parameters, **options)
    fresh = optimizer.state_dict()
    layout = {key: (value.shape, value.dtype) for key, value in tensors_of(fresh).items()}
    assert {index for index, _ in layout} == set(range(len(MIXED_SHAPES)))
    assert all(isinstance(value, Tensor) for value in tensors_of(fresh).values())
    train(optimizer, parameters, steps=2)
    assert {key: (v.shape, v.dtype) for key, v in tensors_of(optimizer.state_dict()).items()} == layout


@both
def test_low_rank_state_is_as_small_as_promised(kind: str) -> None:
    parameters = make_parameters([(24, 10), (10, 24)], torch.float32)
    optimizer = make(kind, parameters)
    train(optimizer, parameters, steps=1)
    for parameter in parameters:
        numbers = sum(value.numel() for value in optimizer.state[parameter].values())
        # Two moments of 24 x 3, or one momentum of 24 x 10; three indices, ages or a step count on top.
        assert numbers <= (2 * 24 * 3 if kind == "dct_adamw" else 24 * 10) + 3 + 3 + 1


@each
@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copied_optimizer_continues_on_the_copied_parameters(kind: str, through: Any) -> None:
    parameters = make_parameters(MIXED_SHAPES)
    optimizer = make(kind, parameters)
    train(optimizer, parameters, steps=3)
    copied_parameters, copied = through((parameters, optimizer))
    train(optimizer, parameters, steps=6, skip=3)
    train(copied, copied_parameters, steps=6, skip=3)
    assert_bitwise_equal([p.detach() for p in copied_parameters], [p.detach() for p in parameters])


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "used"])
def test_a_state_of_another_rank_is_refused_with_the_name_of_the_parameter(stepped: bool) -> None:
    parameters = make_parameters([(8, 6), (6,)])
    optimizer = DCTAdamW([("attention.q", parameters[0]), ("attention.bias", parameters[1])], rank=3)
    train(optimizer, parameters, steps=2)
    others = make_parameters([(8, 6), (6,)])
    other = DCTAdamW([("attention.q", others[0]), ("attention.bias", others[1])], rank=4)
    if stepped:
        train(other, others, steps=1)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"attention\.q"):
        other.load_state_dict(saved)


@both
def test_a_state_of_another_shape_is_refused_with_the_name_of_the_parameter(kind: str) -> None:
    parameters = make_parameters([(8, 6)])
    optimizer = make(kind, [("attention.q", parameters[0])])
    train(optimizer, parameters, steps=2)
    others = make_parameters([(9, 6)])
    other = make(kind, [("attention.q", others[0])])
    references = references_of(kind, others)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 9.0
    with pytest.raises(ValueError, match=r"attention\.q"):
        other.load_state_dict(saved)
    assert_equals_references(other, others, references)  # nothing was half-loaded
