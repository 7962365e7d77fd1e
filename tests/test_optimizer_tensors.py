"""Optimizers take tensors of every kind: dense and of unusual strides, of every dtype, and no complex ones."""

from __future__ import annotations

import pytest
import torch
from references import initial_weight, prescribed_gradients
from torch import nn
from torch.nn import Parameter
from trajectories import (
    MIXED_SHAPES,
    assert_equals_references,
    both,
    each,
    feed,
    make,
    make_gradients,
    make_parameters,
    references_of,
    train,
)

from dist_lowrank.optim import DCTAdamW, Trion

# Dense parameters


DENSE_SHAPES = [(), (7,), (2, 3, 4), (3, 2, 2, 2), (0, 5)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tensors_that_are_no_matrix_follow_torchs_adamw(dtype: torch.dtype) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    theirs = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}
    expected = make_parameters(DENSE_SHAPES, dtype)
    train(torch.optim.AdamW(expected, **theirs), expected, steps=20)

    of_adam = make_parameters(DENSE_SHAPES, dtype)
    train(DCTAdamW(of_adam, **theirs), of_adam, steps=20)
    of_trion = make_parameters(DENSE_SHAPES, dtype)
    options = {"dense_lr": 0.02, "dense_betas": (0.8, 0.95), "dense_eps": 1e-4, "weight_decay": 0.1}
    train(Trion(of_trion, lr=0.5, momentum=0.5, **options), of_trion, steps=20)
    for ours in (of_adam, of_trion):
        for p, q in zip(ours, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@each
def test_a_group_without_low_rank_follows_torchs_adamw_with_its_own_options(kind: str) -> None:
    shapes = [(8, 6), (5,)]
    ours, theirs = make_parameters(shapes, torch.float64), make_parameters(shapes, torch.float64)
    common = {"lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-5}
    dense = common if kind == "dct_adamw" else {f"dense_{key}": value for key, value in common.items()}
    matrix = make_parameters([(9, 7)])
    optimizer = make(kind, [{"params": matrix}, {"params": ours, "low_rank": False, "weight_decay": 0.2, **dense}])
    reference = torch.optim.AdamW(theirs, weight_decay=0.2, **common)
    for gradients in make_gradients(shapes, 20):
        feed(optimizer, [*matrix, *ours], [torch.ones_like(matrix[0]), *gradients])
        feed(reference, theirs, gradients)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@each
@pytest.mark.parametrize("case", ["weight", "gradient", "slice"])
def test_a_dense_tensor_with_unusual_strides_takes_the_same_step(kind: str, case: str) -> None:
    """A kernel that walks memory in order would pair entries wrongly, or write beyond a slice."""
    plain, storage = [Parameter(initial_weight((2, 3, 4, 5)))], initial_weight((2, 3, 4, 10))
    beyond = storage[..., 1::2].clone()
    if case == "slice":
        storage[..., ::2] = plain[0].detach()
        strided = [Parameter(storage[..., ::2])]
    else:
        layout = torch.channels_last if case == "weight" else torch.contiguous_format
        strided = [Parameter(plain[0].detach().clone(memory_format=layout))]
    of_plain, of_strided = make(kind, plain), make(kind, strided)
    for gradient in prescribed_gradients((2, 3, 4, 5), 3):
        feed(of_plain, plain, [gradient])
        strided[0].grad = gradient.to(memory_format=torch.channels_last) if case == "gradient" else gradient.clone()
        of_strided.step()
    torch.testing.assert_close(strided[0].detach(), plain[0].detach(), rtol=0, atol=1e-12)
    assert torch.equal(storage[..., 1::2], beyond)


@each
def test_gradients_and_weights_may_be_strided(kind: str) -> None:
    plain = [Parameter(initial_weight((8, 6)))]
    strided = [Parameter(initial_weight((8, 6)).T.contiguous().T)]
    assert not strided[0].is_contiguous()
    of_plain, of_strided = make(kind, plain), make(kind, strided)
    for gradient in prescribed_gradients((8, 6), 5):
        feed(of_plain, plain, [gradient])
        strided[0].grad = gradient.repeat_interleave(2, dim=1)[:, ::2]
        of_strided.step()
    torch.testing.assert_close(plain[0], strided[0], rtol=0, atol=1e-12)


@each
@pytest.mark.parametrize("shape", [(6,), (6, 4)], ids=str)
def test_a_complex_parameter_is_refused_not_silently_made_real(kind: str, shape: tuple[int, ...]) -> None:
    parameter = Parameter(torch.full(shape, 1 + 1j))
    with pytest.raises((ValueError, TypeError), match="complex"):
        train(make(kind, [parameter]), [parameter], steps=1)
    assert (parameter.detach() == 1 + 1j).all()


# Dtypes


@both
def test_float32_follows_the_float64_reference(kind: str) -> None:
    parameters = make_parameters([(8, 6), (4, 10), (7, 7)], torch.float32)
    # All columns, so that no near-tie of scores can select another one.
    references = references_of(kind, parameters, rank=1.0)
    assert_equals_references(make(kind, parameters, rank=1.0), parameters, references, tolerance=2e-5)


@each
def test_bf16_weights_take_the_float32_update_rounded_once(kind: str) -> None:
    narrow = make_parameters(MIXED_SHAPES, torch.bfloat16)
    wide = [Parameter(p.detach().float()) for p in narrow]
    of_narrow, of_wide = make(kind, narrow), make(kind, wide)
    for gradients in make_gradients(MIXED_SHAPES, 4):
        gradients = [g.bfloat16().double() for g in gradients]
        feed(of_narrow, narrow, gradients)
        feed(of_wide, wide, gradients)
        for p, q in zip(narrow, wide, strict=True):
            assert torch.equal(p.detach(), q.detach().bfloat16())
            q.data.copy_(p.data)  # both go on from the rounded weight
    for p, q in zip(narrow, wide, strict=True):
        assert of_narrow.state[p].keys() == of_wide.state[q].keys()
        for name, value in of_narrow.state[p].items():
            assert value.dtype != torch.bfloat16, name
            assert torch.equal(value, of_wide.state[q][name]), name


def test_moment_dtype_keeps_moments_narrow_and_updates_in_float32() -> None:
    narrow, wide = make_parameters([(8, 6), (4, 10)], torch.float32), make_parameters([(8, 6), (4, 10)], torch.float32)
    of_narrow = DCTAdamW(narrow, lr=0.01, rank=3, moment_dtype=torch.bfloat16)
    of_wide = DCTAdamW(wide, lr=0.01, rank=3)
    train(of_narrow, narrow, steps=1)
    train(of_wide, wide, steps=1)
    for p, q in zip(narrow, wide, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert of_wide.state[q][name].dtype == torch.float32
            assert of_narrow.state[p][name].dtype == torch.bfloat16
            assert torch.equal(of_narrow.state[p][name], of_wide.state[q][name].bfloat16())
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)  # a step is 1e-2, a bf16 moment is good to 1/256
    train(of_narrow, narrow, steps=10, skip=1)
    assert all(of_narrow.state[p]["exp_avg"].dtype == torch.bfloat16 for p in narrow)


@both
def test_a_model_cast_after_construction_is_trained_in_its_new_dtype(kind: str) -> None:
    model = nn.Linear(6, 8, bias=False)
    optimizer = make(kind, model.parameters())
    model.double()
    parameters = list(model.parameters())
    assert_equals_references(optimizer, parameters, references_of(kind, parameters))
