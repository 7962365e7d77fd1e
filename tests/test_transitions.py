"""Moving columns is the product with `D_old^T D_new`, of which every row and column holds at most one 1.

And the steps of DCTAdamW that follow: of columns that stay, leave, return and are fresh.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import dense_dictionary
from torch import Tensor
from torch.nn import Parameter
from trajectories import feed

from dist_lowrank.optim import DCTAdamW
from dist_lowrank.optim.columns import ColumnChange

exploring = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def changes(draw: Any) -> tuple[Tensor, Tensor, int]:
    """Two choices of as many columns, ascending, and the number that there is to choose from."""
    n = draw(st.integers(1, 12))
    rank = draw(st.integers(1, n))
    old, new = (draw(st.permutations(range(n)))[:rank] for _ in range(2))
    return torch.tensor(sorted(old)), torch.tensor(sorted(new)), n


def moments(rank: int) -> tuple[Tensor, Tensor]:
    """First and second moments, (5, rank)."""
    generator = torch.Generator().manual_seed(rank)
    first, second = (torch.randn(5, rank, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second.square()


@given(change=changes(), name=st.sampled_from(["dct2", "dct3", "identity"]))
@exploring
def test_moving_moments_equals_the_dense_rotation(change: tuple[Tensor, Tensor, int], name: str) -> None:
    old, new, n = change
    D = dense_dictionary(name, n)
    rotation = D[:, old].T @ D[:, new]  # (r, r)
    first, second = moments(len(old))
    rotated, squared = first @ rotation, second @ rotation.square()
    ColumnChange(old, new, n).carry("move", [first, second], [])
    torch.testing.assert_close(first, rotated, rtol=0, atol=1e-12)
    torch.testing.assert_close(second, squared, rtol=0, atol=1e-12)
    assert (second >= 0).all()


@given(change=changes())
@exploring
def test_moving_to_the_same_columns_changes_no_bit(change: tuple[Tensor, Tensor, int]) -> None:
    old, _, n = change
    first, _ = moments(len(old))
    before = first.clone()
    ColumnChange(old, old, n).carry("move", [first], [])
    assert torch.equal(first, before)


@given(change=changes())
@exploring
def test_a_column_moves_alike_from_whatever_slot_it_stood_in(change: tuple[Tensor, Tensor, int]) -> None:
    old, new, n = change
    first, _ = moments(len(old))
    order = torch.randperm(len(old), generator=torch.Generator().manual_seed(n))
    shuffled = first[:, order].clone()
    ColumnChange(old, new, n).carry("move", [first], [])
    ColumnChange(old[order], new, n).carry("move", [shuffled], [])
    assert torch.equal(first, shuffled)


@pytest.mark.parametrize("transition", ["move", "reset"])
def test_a_column_that_is_dropped_and_chosen_again_starts_at_zero(transition: str) -> None:
    first = torch.ones(3, 1)
    for old, new in ((2, 0), (0, 2)):
        ColumnChange(torch.tensor([old]), torch.tensor([new]), 4).carry(transition, [first], [])
    assert (first == 0).all()


def columns_sequence(selections: list[list[int]], transition: str, **options: Any) -> list[torch.Tensor]:
    """Weights after each step with ones in the selected columns of the gradient; lr 1, identity dictionary."""
    parameter = Parameter(torch.zeros(4, 5, dtype=torch.float64))
    optimizer = DCTAdamW(
        [parameter],
        lr=1.0,
        rank=len(selections[0]),
        dictionary="identity",
        side="right",
        transition=transition,
        **options,
    )
    weights = []
    for selection in selections:
        gradient = torch.zeros(4, 5, dtype=torch.float64)
        gradient[:, selection] = 1.0
        feed(optimizer, [parameter], [gradient])
        weights.append(parameter.detach().clone())
    return weights


def adam_step(gradients: list[float], t: int, b1: float, b2: float) -> float:
    """The step of Adam whose moments received these gradients, bias-corrected for `t` steps, eps -> 0."""
    m = v = 0.0
    for g in gradients:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return (m / (1 - b1**t)) / (v / (1 - b2**t)) ** 0.5


def test_a_column_that_stays_keeps_its_moments_in_whatever_slot() -> None:
    b1, b2 = 0.9, 0.95
    before, after = columns_sequence([[0, 1], [1, 2]], "move", betas=(b1, b2), eps=1e-12)
    step = before - after
    torch.testing.assert_close(step[:, 1], torch.full((4,), adam_step([1, 1], 2, b1, b2)).double())
    torch.testing.assert_close(step[:, 2], torch.full((4,), adam_step([1], 2, b1, b2)).double())
    assert (step[:, [0, 3, 4]] == 0).all()


def test_a_column_that_leaves_and_returns_starts_from_zero() -> None:
    b1, b2 = 0.9, 0.95
    _, before, after = columns_sequence([[0], [1], [0]], "move", betas=(b1, b2), eps=1e-12)
    torch.testing.assert_close((before - after)[:, 0], torch.full((4,), adam_step([1], 3, b1, b2)).double())


def test_reset_forgets_every_moment_and_keep_leaves_them_in_their_slot() -> None:
    b1, b2 = 0.9, 0.95
    before, after = columns_sequence([[0, 1], [1, 2]], "reset", betas=(b1, b2), eps=1e-12)
    torch.testing.assert_close((before - after)[:, 1:3], torch.full((4, 2), adam_step([1], 2, b1, b2)).double())
    before, after = columns_sequence([[0, 1], [1, 2]], "keep", betas=(b1, b2), eps=1e-12)
    torch.testing.assert_close((before - after)[:, 1:3], torch.full((4, 2), adam_step([1, 1], 2, b1, b2)).double())


@pytest.mark.parametrize("column_bias_correction", [False, True])
def test_int8_moments_move_with_their_columns_and_fresh_columns_start_at_zero(column_bias_correction: bool) -> None:
    parameter = Parameter(torch.zeros(6, 8, dtype=torch.float64))
    options = {"dictionary": "identity", "moment_dtype": torch.int8, "column_bias_correction": column_bias_correction}
    optimizer = DCTAdamW([parameter], rank=2, side="right", betas=(0.5, 0.5), **options)
    rows = 2.0 ** torch.arange(6, dtype=torch.float64)

    def moments() -> tuple[list[int], torch.Tensor, torch.Tensor]:
        state = optimizer.state[parameter]
        assert state["exp_avg"].dtype == torch.int8
        assert state["exp_avg_sq"].dtype == torch.uint8
        assert state["exp_avg_scales"].dtype == state["exp_avg_sq_scales"].dtype == torch.float32
        decoded = [
            state[f"{name}_scales"].double() * 2 ** ((state[name].double().abs() - top) / 8) * state[name].sign()
            for name, top in (("exp_avg", 127), ("exp_avg_sq", 255))
        ]
        return state["indices"].tolist(), decoded[0], decoded[1]

    gradient = torch.zeros(6, 8, dtype=torch.float64)
    gradient[:, 1], gradient[:, 5] = rows, -4 * rows
    feed(optimizer, [parameter], [gradient])
    assert moments()[0] == [1, 5]
    gradient = torch.zeros(6, 8, dtype=torch.float64)
    gradient[:, 5], gradient[:, 7] = -4 * rows, 16 * rows
    feed(optimizer, [parameter], [gradient])
    indices, mean, square = moments()
    assert indices == [5, 7]
    torch.testing.assert_close(mean[:, 0], -3 * rows, rtol=0.1, atol=0)  # half of -2 and half of -4
    torch.testing.assert_close(square[:, 0], 12 * rows**2, rtol=0.1, atol=0)
    torch.testing.assert_close(mean[:, 1], 8 * rows)  # the largest of their rows are exact
    torch.testing.assert_close(square[:, 1], 128 * rows**2)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.9)], ids=str)
@pytest.mark.parametrize("corrected", [False, True])
def test_a_fresh_column_late_in_training_steps_by_the_known_factor(corrected: bool, betas: tuple[float, float]) -> None:
    selections = [[0]] * 400 + [[3]]
    weights = columns_sequence(selections, "move", betas=betas, eps=1e-12, column_bias_correction=corrected)
    expected = 1.0 if corrected else (1 - betas[0]) / (1 - betas[1]) ** 0.5
    torch.testing.assert_close(
        (weights[-2] - weights[-1])[:, 3], torch.full((4,), expected).double(), rtol=1e-6, atol=0
    )
