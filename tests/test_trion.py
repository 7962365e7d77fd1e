"""Trion equals its formula, and has the properties that the method claims."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import (
    ReferenceMuon,
    ReferenceTrion,
    dense_dictionary,
    initial_weight,
    newton_schulz,
    prescribed_gradients,
    select,
)
from support_matrix import supports
from torch.nn import Parameter
from trajectories import (
    SHAPES,
    SHAPES_FOR_HADAMARD,
    assert_equals_references,
    feed,
    make_parameters,
    reference_dictionary,
    train,
)

from dist_lowrank.optim import Trion

BASE: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "rank": 3}
OPTIONS: list[dict[str, Any]] = [
    {"ranking": "l1"},
    {"ranking": "l1", "rank": 1, "side": "longer"},
    {"dictionary": "dct3"},
    {"dictionary": "random", "seed": 5},
    {"dictionary": "random", "side": "longer", "rank": 0.5},
    {"dictionary": "identity"},
    {"dictionary": "hadamard"},
    {"momentum": 0.0},
    {"momentum": 0.99, "lr": 0.2},
    {"weight_decay": 0.0},
    {"newton_schulz_steps": 1},
    {"newton_schulz_steps": 8, "side": "left"},
    {"scale": "none"},
    {"scale": "match_rms_adamw"},
    {"scale": "match_rms_adamw", "side": "longer", "rank": 0.5},
]


def assert_follows_the_formula(options: dict[str, Any], steps: int = 20) -> None:
    options = BASE | options
    shapes = SHAPES_FOR_HADAMARD if options.get("dictionary") == "hadamard" else SHAPES
    parameters = make_parameters(shapes)
    of_formula = {key: value for key, value in options.items() if key not in ("dictionary", "seed")}
    references = [
        ReferenceTrion(
            parameter,
            dictionary=reference_dictionary(
                options.get("dictionary", "dct2"), shape, options.get("side", "shorter"), options.get("seed", 0)
            ),
            **of_formula,
        )
        for parameter, shape in zip(parameters, shapes, strict=True)
    ]
    assert_equals_references(Trion(parameters, **options), parameters, references, steps=steps)


@supports("exact", strategy="one process", optimizer="Trion")
@pytest.mark.parametrize("side", ["shorter", "longer", "right", "left"])
@pytest.mark.parametrize("rank", [1, 3, 0.25, 0.35, 1.0, 99])
def test_twenty_steps_equal_the_reference_at_every_rank_and_side(rank: float, side: str) -> None:
    assert_follows_the_formula({"rank": rank, "side": side})


@supports("exact", strategy="one process", optimizer="Trion")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_twenty_steps_equal_the_reference_with_every_option(options: dict[str, Any]) -> None:
    assert_follows_the_formula(options)


def test_momentum_in_dictionary_coordinates_does_not_drift_from_momentum_in_space() -> None:
    assert_follows_the_formula({}, steps=100)


@pytest.mark.parametrize("side", ["shorter", "longer"])
@pytest.mark.parametrize("dictionary", ["dct2", "dct3", "random", "hadamard", "identity"])
def test_all_columns_equal_heavy_ball_muon(dictionary: str, side: str) -> None:
    shapes = [(16, 8), (8, 16), (8, 8)]
    common: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    parameters = make_parameters(shapes)
    references = [ReferenceMuon(p, scale=max(1.0, (p.shape[0] / p.shape[1]) ** 0.5), **common) for p in parameters]
    optimizer = Trion(parameters, rank=1.0, dictionary=dictionary, side=side, **common)
    assert_equals_references(optimizer, parameters, references)


def test_the_identity_dictionary_orthogonalises_columns_of_the_momentum_itself() -> None:
    """The rule of Dion2: accumulate, pick columns, orthogonalise them, decay what was picked."""
    parameter = Parameter(initial_weight((20, 12)))
    weight, momentum = initial_weight((20, 12)), torch.zeros(20, 12, dtype=torch.float64)
    optimizer = Trion([parameter], lr=0.1, weight_decay=0.0, rank=4, dictionary="identity", ranking="l1", scale="none")
    for gradient in prescribed_gradients((20, 12), 20):
        feed(optimizer, [parameter], [gradient])
        momentum += gradient
        picked = select(momentum, 4, "l1")
        weight[:, picked] -= 0.1 * newton_schulz(momentum[:, picked], 5)
        momentum[:, picked] *= 0.95
        torch.testing.assert_close(parameter.detach(), weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"dictionary": "random"}, {"dictionary": "dct3", "ranking": "l1"}], ids=str)
def test_left_of_a_gradient_equals_right_of_its_transpose(options: dict[str, Any]) -> None:
    for shape in SHAPES:
        left, right = Parameter(initial_weight(shape)), Parameter(initial_weight(shape).T.contiguous())
        of_left = Trion([left], side="left", scale="none", **BASE | options)
        of_right = Trion([right], side="right", scale="none", **BASE | options)
        for gradient in prescribed_gradients(shape, 20):
            feed(of_left, [left], [gradient])
            feed(of_right, [right], [gradient.T.contiguous()])
            torch.testing.assert_close(left.detach(), right.detach().T, rtol=0, atol=1e-12)


def test_selected_momentum_shrinks_by_mu_and_the_rest_accumulates_untouched() -> None:
    mu, D = 0.8, dense_dictionary("dct2", 10)
    parameter = Parameter(initial_weight((14, 10)))
    optimizer = Trion([parameter], momentum=mu, rank=3)
    momentum = torch.zeros(14, 10, dtype=torch.float64)
    for gradient in prescribed_gradients((14, 10), 10):
        feed(optimizer, [parameter], [gradient])
        accumulated = momentum + gradient @ D  # B in dictionary coordinates
        picked = select(accumulated, 3, "l2")
        expected = accumulated.clone()
        expected[:, picked] *= mu
        momentum = optimizer.state[parameter]["momentum"].clone()
        torch.testing.assert_close(momentum, expected, rtol=0, atol=1e-12)


def test_a_column_that_is_never_selected_accumulates_the_plain_sum_of_gradients() -> None:
    parameter = Parameter(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = Trion([parameter], rank=1, dictionary="identity", momentum=0.9)
    for t in range(1, 12):
        gradient = torch.zeros(6, 4, dtype=torch.float64)
        gradient[:, 0], gradient[:, 2] = 1.0, 0.1
        feed(optimizer, [parameter], [gradient])
        expected = torch.full((6,), 0.1 * t, dtype=torch.float64)  # column 0 always holds more
        torch.testing.assert_close(optimizer.state[parameter]["momentum"][:, 2], expected)


def one_update(shape: tuple[int, int], **options: Any) -> torch.Tensor:
    """What a first step at lr 1 takes off the weight."""
    parameter = Parameter(torch.zeros(shape, dtype=torch.float64))
    feed(Trion([parameter], lr=1.0, weight_decay=0.0, **options), [parameter], prescribed_gradients(shape, 1))
    return -parameter.detach()


@pytest.mark.parametrize("shape", [(60, 12), (12, 60)], ids=str)
def test_the_update_has_rank_r_and_singular_values_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(one_update(shape, rank=5, scale="none"))
    assert (values[5:] < 1e-12).all()
    assert values[:5].min() > 0.65
    assert values[:5].max() < 1.25


@pytest.mark.parametrize("shape", [(18, 8), (8, 18), (8, 8)], ids=str)
def test_scales_multiply_the_update_by_their_factor(shape: tuple[int, int]) -> None:
    plain = one_update(shape, rank=3, scale="none")
    rows, columns = shape
    for scale, factor in {
        "spectral": max(1.0, (rows / columns) ** 0.5),
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
    }.items():
        torch.testing.assert_close(one_update(shape, rank=3, scale=scale), factor * plain, rtol=1e-12, atol=1e-14)


def test_a_zero_gradient_only_decays_the_weight() -> None:
    parameters = make_parameters(SHAPES)
    before = [p.detach().clone() for p in parameters]
    optimizer = Trion(parameters, lr=0.1, weight_decay=0.5, rank=3)
    for _ in range(3):
        feed(optimizer, parameters, [torch.zeros_like(p) for p in parameters])
    for parameter, weight in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), weight * 0.95**3)


def test_the_step_does_not_depend_on_the_scale_of_the_gradient() -> None:
    small, large = (Parameter(torch.zeros(12, 8, dtype=torch.float64)) for _ in range(2))
    train(Trion([small], rank=3), [small], steps=1)
    feed(Trion([large], rank=3), [large], [1e6 * g for g in prescribed_gradients((12, 8), 1)])
    torch.testing.assert_close(small, large, rtol=0, atol=1e-7)


@pytest.mark.parametrize("steps", [5, 10])
def test_float32_orthogonalises_a_gradient_of_lower_rank_than_r_without_blowing_up(steps: int) -> None:
    """The first gradients of a small batch have no more rank than tokens."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(96, 4, generator=generator) @ torch.randn(4, 40, generator=generator)
    parameter = Parameter(torch.zeros(96, 40))
    reference = ReferenceTrion(parameter, rank=20, lr=1.0, weight_decay=0.0, newton_schulz_steps=steps, scale="none")
    optimizer = Trion([parameter], rank=20, lr=1.0, weight_decay=0.0, newton_schulz_steps=steps, scale="none")
    feed(optimizer, [parameter], [gradient])
    reference.step(gradient)
    torch.testing.assert_close(parameter.detach().double(), reference.weight, rtol=0, atol=2e-3)
