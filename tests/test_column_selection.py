"""Which columns are selected: optimal for l2, bounded for l1, deterministic in ties."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from references import dense_dictionary, select
from torch import Tensor

from dist_lowrank.subspaces import column_scores, top_columns

exploring = settings(max_examples=60, deadline=None, derandomize=True)

# Small integers make ties common and sums exact; floats of very different sizes make rounding matter.
integer_matrices = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.integers(-3, 3))
float_matrices = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, max_side=8),
    elements=st.floats(-1e3, 1e3).map(lambda x: x if abs(x) > 1e-30 else 0.0),  # squares stay normal
)
matrices = st.one_of(integer_matrices, float_matrices).map(lambda a: torch.from_numpy(a.copy()))
some_rank = st.integers(1, 8)


def selected(coordinates: Tensor, rank: int, ranking: str = "l2") -> list[int]:
    return top_columns(column_scores(coordinates, ranking), min(rank, coordinates.shape[1])).tolist()


def energy_outside(coordinates: Tensor, indices: list[int]) -> float:
    outside = [k for k in range(coordinates.shape[1]) if k not in indices]
    return float(coordinates[:, outside].square().sum())


@given(coordinates=matrices, rank=some_rank, ranking=st.sampled_from(["l2", "l1"]))
@exploring
def test_indices_are_ascending_unique_in_range_and_as_in_the_reference(coordinates, rank, ranking) -> None:
    scores = column_scores(coordinates, ranking)
    power = {"l2": 2, "l1": 1}[ranking]
    torch.testing.assert_close(scores, coordinates.abs().pow(power).sum(dim=0), rtol=1e-13, atol=0)

    rank = min(rank, coordinates.shape[1])
    indices = top_columns(scores, rank)
    assert indices.dtype == torch.int64
    assert indices.shape == (rank,)
    assert indices.min() >= 0
    assert indices.max() < coordinates.shape[1]
    assert (indices[1:] > indices[:-1]).all()
    by_score_then_index = sorted(range(len(scores)), key=lambda k: (-scores[k].item(), k))[:rank]
    assert indices.tolist() == sorted(by_score_then_index)


@given(coordinates=matrices, rank=some_rank)
@exploring
def test_l2_keeps_at_least_the_energy_of_every_other_subset(coordinates, rank) -> None:
    rank = min(rank, coordinates.shape[1])
    energy = coordinates.square().sum(dim=0)
    kept = energy[selected(coordinates, rank)].sum()
    best = max(energy[list(subset)].sum() for subset in combinations(range(coordinates.shape[1]), rank))
    assert kept >= best * (1 - 1e-12)


@given(matrix=matrices, rank=some_rank)
@exploring
def test_l2_residual_is_within_the_contraction_bound(matrix, rank) -> None:
    n = matrix.shape[1]
    coordinates = matrix @ dense_dictionary("dct2", n)
    rank = min(rank, n)
    total = float(matrix.square().sum())
    assert energy_outside(coordinates, selected(coordinates, rank)) <= (1 - rank / n) * total + 1e-9 * total


@given(coordinates=matrices, rank=some_rank)
@exploring
def test_l1_residual_is_within_its_weaker_bound(coordinates, rank) -> None:
    L, n = coordinates.shape
    rank = min(rank, n)
    total = float(coordinates.square().sum())
    bound = (1 - rank / (rank + L * (n - rank))) * total
    assert energy_outside(coordinates, selected(coordinates, rank, "l1")) <= bound + 1e-9 * total


def test_l1_can_keep_the_weaker_column_and_attain_its_bound() -> None:
    L = 16
    coordinates = torch.zeros(L, 2, dtype=torch.float64)
    coordinates[:, 0] = 1 / L + 1e-6
    coordinates[3, 1] = 1.0
    assert selected(coordinates, 1, "l2") == [1]
    assert selected(coordinates, 1, "l1") == [0]
    fraction_lost = energy_outside(coordinates, [0]) / float(coordinates.square().sum())
    assert fraction_lost == pytest.approx(0.941, abs=1e-3)
    assert fraction_lost <= 1 - 1 / (1 + L)


@given(matrix=matrices)
@exploring
def test_l2_scores_sum_to_the_energy_of_the_matrix(matrix) -> None:
    for name in ("dct2", "dct3", "identity"):
        scores = column_scores(matrix @ dense_dictionary(name, matrix.shape[1]), "l2")
        torch.testing.assert_close(scores.sum(), matrix.square().sum(), rtol=1e-12, atol=0)


@given(coordinates=matrices, rank=some_rank, ranking=st.sampled_from(["l2", "l1"]), exponent=st.integers(-20, 20))
@exploring
def test_selection_does_not_depend_on_scale(coordinates, rank, ranking, exponent) -> None:
    scaled = -coordinates * 2.0**exponent
    assert selected(scaled, rank, ranking) == selected(coordinates, rank, ranking)


@given(matrix=integer_matrices, rank=some_rank, ranking=st.sampled_from(["l2", "l1"]), seed=st.integers(0, 99))
@exploring
def test_selection_does_not_depend_on_the_order_of_rows(matrix, rank, ranking, seed) -> None:
    coordinates = torch.from_numpy(matrix.copy())
    order = torch.randperm(len(coordinates), generator=torch.Generator().manual_seed(seed))
    assert selected(coordinates[order], rank, ranking) == selected(coordinates, rank, ranking)


@given(matrix=integer_matrices, cut=st.integers(0, 8), ranking=st.sampled_from(["l2", "l1"]))
@exploring
def test_scores_of_blocks_of_rows_add_up(matrix, cut, ranking) -> None:
    coordinates = torch.from_numpy(matrix.copy())
    blocks = coordinates[:cut], coordinates[cut:]  # one of them may be empty
    summed = sum(column_scores(block, ranking) for block in blocks)
    torch.testing.assert_close(summed, column_scores(coordinates, ranking), rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_l2_selection_is_invariant_under_rotation_of_the_rows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    coordinates = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    assert selected(rotation @ coordinates, 4) == selected(coordinates, 4)


@pytest.mark.parametrize("wanted", [[0], [0, 1, 2], [2, 5, 8], [8]], ids=str)
@pytest.mark.parametrize("name", ["dct2", "dct3", "identity"])
def test_a_matrix_in_the_span_of_some_columns_selects_them_without_residual(name: str, wanted: list[int]) -> None:
    D = dense_dictionary(name, 9)
    factor = torch.randn(14, len(wanted), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    coordinates = factor @ D[:, wanted].T @ D
    for ranking in ("l2", "l1"):
        assert selected(coordinates, len(wanted), ranking) == wanted
    assert energy_outside(coordinates, wanted) < 1e-25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 5, 257, 4096])
def test_ties_go_to_the_lowest_index(n: int, dtype: torch.dtype) -> None:
    rank = (n + 2) // 3
    for value in (0.0, 1.0, 3.5):
        assert top_columns(torch.full((n,), value, dtype=dtype), rank).tolist() == list(range(rank))

    scores = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(n)).to(dtype)  # ties everywhere
    expected = select(scores.double()[None], rank, "l1")
    assert top_columns(scores, rank).tolist() == expected


@pytest.mark.parametrize("ranking", ["l2", "l1"])
def test_zero_coordinates_score_zero_and_select_the_first_columns(ranking: str) -> None:
    scores = column_scores(torch.zeros(4, 6), ranking)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [0.0] * 6
    assert top_columns(scores, 2).tolist() == [0, 1]


def test_selecting_all_columns_gives_all_indices() -> None:
    scores = torch.tensor([0.0, 3.0, 1.0, 3.0])
    assert top_columns(scores, 4).tolist() == [0, 1, 2, 3]
