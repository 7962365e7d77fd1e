"""DCTAdamW equals its formula, and has the properties that the method claims."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import ReferenceDCTAdamW, dense_dictionary, initial_weight, prescribed_gradients, rank_of
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

from dist_lowrank.optim import DCTAdamW

BASE: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1, "rank": 3}
OPTIONS: list[dict[str, Any]] = [
    {"ranking": "l1"},
    {"ranking": "l1", "rank": 1, "side": "longer"},
    {"dictionary": "dct3"},
    {"dictionary": "random", "seed": 5},
    {"dictionary": "random", "side": "longer", "rank": 0.5},
    {"dictionary": "identity"},
    {"dictionary": "hadamard"},
    {"dictionary": "hadamard", "transition": "keep", "ranking": "l1"},
    {"transition": "reset"},
    {"transition": "keep"},
    {"transition": "keep", "rank": 1.0},
    {"refresh_interval": 3},
    {"refresh_interval": 3, "transition": "reset"},
    {"refresh_interval": 3, "transition": "keep", "side": "left"},
    {"refresh_interval": 100},
    {"weight_decay": 0.0},
    {"weight_decay": 0.0, "lr": 0.5, "betas": (0.0, 0.5)},
    {"betas": (0.8, 0.95), "eps": 1e-3},
    {"eps": 0.5},
    {"column_bias_correction": True},
    {"column_bias_correction": True, "refresh_interval": 3, "side": "right"},
    {"column_bias_correction": True, "transition": "reset"},
    {"column_bias_correction": True, "transition": "reset", "refresh_interval": 3},
    {"column_bias_correction": True, "transition": "keep"},
    {"error_feedback": "fp32"},
    {"error_feedback": "fp32", "refresh_interval": 3, "side": "longer"},
    {"error_feedback": "fp32", "transition": "reset", "refresh_interval": 3},
    {"error_feedback": "fp32", "transition": "keep", "ranking": "l1", "dictionary": "dct3"},
    {"error_feedback": "fp32", "column_bias_correction": True, "side": "left", "rank": 0.5},
    {"error_feedback": "fp32", "rank": 1.0},
    {"error_feedback": "fp32", "error_feedback_momentum": True},
    {"error_feedback": "fp32", "error_feedback_momentum": True, "refresh_interval": 3, "side": "longer"},
    {"error_feedback": "bf16"},
    {"error_feedback": "int8"},
    {"error_feedback": "int8", "side": "longer", "refresh_interval": 3},
    {"error_feedback": "int8", "error_feedback_momentum": True, "dictionary": "dct3", "betas": (0.8, 0.95)},
    {"error_feedback": "int4"},
    {"error_feedback": "int4", "side": "longer", "ranking": "l1", "column_bias_correction": True},
    {"error_feedback": "int4", "error_feedback_momentum": True, "refresh_interval": 3},
]


def assert_follows_the_formula(options: dict[str, Any]) -> None:
    options = BASE | options
    shapes = SHAPES_FOR_HADAMARD if options.get("dictionary") == "hadamard" else SHAPES
    parameters = make_parameters(shapes)
    of_formula = {key: value for key, value in options.items() if key not in ("dictionary", "seed")}
    references = [
        ReferenceDCTAdamW(
            parameter,
            dictionary=reference_dictionary(
                options.get("dictionary", "dct2"), shape, options.get("side", "shorter"), options.get("seed", 0)
            ),
            **of_formula,
        )
        for parameter, shape in zip(parameters, shapes, strict=True)
    ]
    optimizer = DCTAdamW(parameters, **options)
    tolerance = 1e-4 if options.get("error_feedback") == "fp32" else 1e-10
    assert_equals_references(optimizer, parameters, references, tolerance=tolerance)
    for parameter, reference in zip(parameters, references, strict=True):
        assert optimizer.state[parameter]["indices"].tolist() == reference.indices


@supports("exact", strategy="one process", optimizer="DCTAdamW")
@pytest.mark.parametrize("side", ["shorter", "longer", "right", "left"])
@pytest.mark.parametrize("rank", [1, 3, 0.25, 0.35, 1.0, 99])
def test_twenty_steps_equal_the_reference_at_every_rank_and_side(rank: float, side: str) -> None:
    assert_follows_the_formula({"rank": rank, "side": side})


@supports("exact", strategy="one process", optimizer="DCTAdamW")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_twenty_steps_equal_the_reference_with_every_option(options: dict[str, Any]) -> None:
    assert_follows_the_formula(options)


@pytest.mark.parametrize(
    ("rank", "n", "expected"),
    [(0.25, 10, 2), (0.35, 10, 4), (0.25, 6, 2), (0.25, 1, 1), (0.01, 10, 1), (1.0, 7, 7), (1, 7, 1), (8, 7, 7)],
)
def test_a_fraction_rank_rounds_half_to_even_and_an_int_counts_columns(rank: float, n: int, expected: int) -> None:
    assert rank_of(rank, n) == expected
    parameters = make_parameters([(n + 2, n), (n, n + 2)])
    optimizer = DCTAdamW(parameters, rank=rank)
    train(optimizer, parameters, steps=1)
    for parameter in parameters:
        assert optimizer.state[parameter]["indices"].shape == (expected,)
        assert optimizer.state[parameter]["exp_avg"].shape == (n + 2, expected)


@pytest.mark.parametrize("refresh_interval", [1, 4])
@pytest.mark.parametrize("dictionary", ["dct2", "dct3", "random", "hadamard"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_all_columns_equal_adamw_in_rotated_coordinates(
    dictionary: str, weight_decay: float, refresh_interval: int
) -> None:
    shapes = [(24, 8), (8, 24), (8, 8)]
    common: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    parameters = make_parameters(shapes)
    D = reference_dictionary(dictionary, (8, 8), "shorter")
    D = D if isinstance(D, torch.Tensor) else dense_dictionary(D, 8)
    rotated = [Parameter((p if p.shape[0] >= p.shape[1] else p.T).detach() @ D) for p in parameters]
    ours = DCTAdamW(parameters, rank=1.0, dictionary=dictionary, refresh_interval=refresh_interval, **common)
    theirs = torch.optim.AdamW(rotated, **common)
    gradients = [prescribed_gradients(shape, 20, seed=i) for i, shape in enumerate(shapes)]
    for t in range(20):
        feed(ours, parameters, [g[t] for g in gradients])
        feed(theirs, rotated, [(g[t] if g[t].shape[0] >= g[t].shape[1] else g[t].T) @ D for g in gradients])
        for parameter, weight in zip(parameters, rotated, strict=True):
            tall = parameter.detach() if parameter.shape[0] >= parameter.shape[1] else parameter.detach().T
            torch.testing.assert_close(tall @ D, weight.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["shorter", "longer"])
@pytest.mark.parametrize("transition", ["move", "keep"])
def test_identity_with_all_columns_is_torchs_adamw(side: str, transition: str) -> None:
    common: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    parameters, others = make_parameters(SHAPES), make_parameters(SHAPES)
    train(
        DCTAdamW(parameters, rank=1.0, dictionary="identity", side=side, transition=transition, **common),
        parameters,
        steps=20,
    )
    train(torch.optim.AdamW(others, **common), others, steps=20)
    for parameter, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dictionary": "random"},
        {"dictionary": "dct3", "ranking": "l1", "refresh_interval": 3},
        {"error_feedback": "fp32", "column_bias_correction": True},
    ],
    ids=str,
)
def test_left_of_a_gradient_equals_right_of_its_transpose(options: dict[str, Any]) -> None:
    for shape in SHAPES:
        left, right = Parameter(initial_weight(shape)), Parameter(initial_weight(shape).T.contiguous())
        of_left = DCTAdamW([left], side="left", **BASE | options)
        of_right = DCTAdamW([right], side="right", **BASE | options)
        for gradient in prescribed_gradients(shape, 20):
            feed(of_left, [left], [gradient])
            feed(of_right, [right], [gradient.T.contiguous()])
            torch.testing.assert_close(left.detach(), right.detach().T, rtol=0, atol=1e-13)


def test_longer_is_the_opposite_of_shorter_and_a_square_goes_left() -> None:
    for shape in SHAPES:
        opposite = "left" if shape[0] >= shape[1] else "right"
        by_rule, by_name = Parameter(initial_weight(shape)), Parameter(initial_weight(shape))
        train(DCTAdamW([by_rule], side="longer", **BASE), [by_rule], steps=3)
        train(DCTAdamW([by_name], side=opposite, **BASE), [by_name], steps=3)
        assert torch.equal(by_rule, by_name)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_update_lies_in_the_span_of_the_selected_columns(side: str) -> None:
    parameter = Parameter(initial_weight((14, 11)))
    optimizer = DCTAdamW([parameter], lr=1.0, rank=4, side=side)
    D = dense_dictionary("dct2", 11 if side == "right" else 14)
    for gradient in prescribed_gradients((14, 11), 5):
        before = parameter.detach().clone()
        feed(optimizer, [parameter], [gradient])
        update = before - parameter.detach()
        update = update if side == "right" else update.T
        basis = D[:, optimizer.state[parameter]["indices"].long()]
        torch.testing.assert_close(update @ basis @ basis.T, update, rtol=0, atol=1e-12)
        assert torch.linalg.matrix_rank(update) == 4


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.9, 0.999)], ids=str)
@pytest.mark.parametrize("decades", [0, 2, 4])
def test_int8_moments_descend_a_noisy_quadratic_as_float32_does(decades: float, betas: tuple[float, float]) -> None:
    """Curvatures `decades` apart within one row: evenly spaced codes would take the flat directions for zero."""
    losses = {}
    for moment_dtype in (torch.float32, torch.int8):
        generator = torch.Generator().manual_seed(1)
        curvature = 10 ** (-decades * torch.rand(24, 40, generator=generator))
        weight = Parameter(torch.randn(24, 40, generator=generator))
        options = {"rank": 1.0, "dictionary": "identity", "side": "right", "moment_dtype": moment_dtype}
        optimizer = DCTAdamW([weight], lr=0.02, betas=betas, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 300)
        for _ in range(300):
            before = weight.detach().clone()
            noise = 0.3 * torch.randn(24, 40, generator=generator)
            weight.grad = curvature * (before + noise)
            optimizer.step()
            assert (weight.detach() - before).abs().max() < 2 * 0.02  # no direction explodes
            schedule.step()
        losses[moment_dtype] = float((curvature * weight.detach().square()).sum())
    assert losses[torch.int8] == pytest.approx(losses[torch.float32], rel=0.1)


@pytest.mark.parametrize("refresh_interval", [1, 3, 7])
def test_columns_change_only_at_step_one_and_at_multiples_of_the_interval(refresh_interval: int) -> None:
    parameter = Parameter(initial_weight((12, 10)))
    optimizer = DCTAdamW([parameter], rank=2, dictionary="identity", refresh_interval=refresh_interval)
    assert optimizer.captured_energy() == {}
    previous = None
    for t in range(1, 22):
        gradient = torch.zeros(12, 10, dtype=torch.float64)
        gradient[:, [t % 10, (t + 3) % 10]] = 1.0
        feed(optimizer, [parameter], [gradient])
        indices = optimizer.state[parameter]["indices"].tolist()
        if t == 1 or t % refresh_interval == 0:
            assert indices == sorted([t % 10, (t + 3) % 10])
            assert optimizer.captured_energy() == {"parameter_0": pytest.approx(1.0)}
        else:
            assert indices == previous
        previous = indices


@pytest.mark.parametrize("options", [{}, {"error_feedback": "fp32"}, {"column_bias_correction": True}], ids=str)
def test_a_zero_gradient_only_decays_the_weight(options: dict[str, Any]) -> None:
    parameters = make_parameters(SHAPES)
    before = [p.detach().clone() for p in parameters]
    optimizer = DCTAdamW(parameters, lr=0.1, weight_decay=0.5, rank=3, **options)
    for _ in range(3):
        feed(optimizer, parameters, [torch.zeros_like(p) for p in parameters])
    for parameter, weight in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), weight * 0.95**3)
        r = min(3, *parameter.shape)
        assert optimizer.state[parameter]["indices"].tolist() == list(range(r))
