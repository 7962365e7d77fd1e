"""Moving columns is the product with `D_old^T D_new`, of which every row and column holds at most one 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import dense_dictionary
from torch import Tensor

from dist_lowrank.optim.transitions import change_columns

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
    change_columns("move", [first, second], old, new, n)
    torch.testing.assert_close(first, rotated, rtol=0, atol=1e-12)
    torch.testing.assert_close(second, squared, rtol=0, atol=1e-12)
    assert (second >= 0).all()


@given(change=changes())
@exploring
def test_moving_to_the_same_columns_changes_no_bit(change: tuple[Tensor, Tensor, int]) -> None:
    old, _, n = change
    first, _ = moments(len(old))
    before = first.clone()
    change_columns("move", [first], old, old, n)
    assert torch.equal(first, before)


@given(change=changes())
@exploring
def test_a_column_moves_alike_from_whatever_slot_it_stood_in(change: tuple[Tensor, Tensor, int]) -> None:
    old, new, n = change
    first, _ = moments(len(old))
    order = torch.randperm(len(old), generator=torch.Generator().manual_seed(n))
    shuffled = first[:, order].clone()
    change_columns("move", [first], old, new, n)
    change_columns("move", [shuffled], old[order], new, n)
    assert torch.equal(first, shuffled)


@pytest.mark.parametrize("transition", ["move", "reset"])
def test_a_column_that_is_dropped_and_chosen_again_starts_at_zero(transition: str) -> None:
    first = torch.ones(3, 1)
    for old, new in ((2, 0), (0, 2)):
        change_columns(transition, [first], torch.tensor([old]), torch.tensor([new]), 4)
    assert (first == 0).all()
