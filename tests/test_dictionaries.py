"""The dictionaries are orthonormal, are the transforms that they are named after, and are built exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import dense_dictionary

from dist_lowrank.dictionaries import Dictionary, columns

ALL_NAMES = ["dct2", "dct3", "hadamard", "random", "identity"]


def sizes_of(name: str) -> list[int]:
    return [1, 2, 4, 6, 12, 64, 100, 256] if name == "hadamard" else [1, 2, 3, 7, 64, 65]


@pytest.mark.parametrize("name", ALL_NAMES)
def test_columns_are_orthonormal(name: str) -> None:
    for n in sizes_of(name):
        D = columns(name, n)
        assert D.shape == (n, n)
        assert D.dtype == torch.float64
        torch.testing.assert_close(D.T @ D, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["dct2", "dct3", "hadamard", "identity"])
def test_columns_equal_scipys_matrix(name: str) -> None:
    for n in sizes_of(name):
        torch.testing.assert_close(columns(name, n), dense_dictionary(name, n), rtol=0, atol=1e-13)


@given(n=st.integers(1, 96))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_dct2_is_orthonormal_at_any_size(n: int) -> None:
    D = columns("dct2", n)
    torch.testing.assert_close(D, dense_dictionary("dct2", n), rtol=0, atol=1e-13)
    torch.testing.assert_close(D.T @ D, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(columns("dct3", n), D.T, rtol=0, atol=0)


def exact_dct2_rows(rows: np.ndarray, n: int) -> np.ndarray:
    """Rows of the DCT-II dictionary in extended precision, from the cosines themselves."""
    j, k = rows[:, None].astype(np.int64), np.arange(n, dtype=np.int64)[None, :]
    angle = (k * (2 * j + 1) % (4 * n)).astype(np.longdouble)
    pi = np.longdouble("3.14159265358979323846264338327950288")
    scale = np.where(k == 0, np.sqrt(np.longdouble(1) / n), np.sqrt(np.longdouble(2) / n))
    return scale * np.cos(pi * angle / (2 * n))


def test_dct2_of_4096_is_orthonormal_to_1e_12_and_its_float32_cast_is_within_one_ulp() -> None:
    n = 4096
    D = columns("dct2", n)
    some = torch.arange(0, n, 41)  # the whole Gram matrix would take most of this file's time
    gram = D[:, some].T @ D
    gram[torch.arange(len(some)), some] -= 1
    assert gram.abs().max() < 1e-12

    rows = np.array([0, 1, 2, 1000, 2047, 2048, 3001, 4094, 4095])
    exact = exact_dct2_rows(rows, n)
    assert np.abs(D[rows].numpy() - exact).max() < 1e-15
    narrow = columns("dct2", n, dtype=torch.float32)
    assert narrow.dtype == torch.float32
    one_ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.longdouble)
    assert (np.abs(narrow[rows].numpy().astype(np.longdouble) - exact) <= one_ulp).all()


def test_columns_of_16384_made_on_the_fly_are_within_one_ulp_in_float32() -> None:
    n = 16384
    dictionary = Dictionary(
        "dct3", n, dtype=torch.float32, device=torch.device("cpu"), transform="fft", materialize=False
    )
    some = np.array([0, 1, 2, 1000, 8191, 8192, 12001, 16382, 16383])
    unit = torch.eye(len(some))
    made = torch.zeros(len(some), n)  # columns of dct3 are rows of dct2
    dictionary.add_lifted(made, unit, torch.from_numpy(some), decay=0.0, scale=1.0)
    exact = exact_dct2_rows(some, n)
    one_ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.longdouble)
    assert (np.abs(made.numpy().astype(np.longdouble) - exact) <= one_ulp).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_narrow_dictionary_is_the_float64_one_cast(name: str, dtype: torch.dtype) -> None:
    torch.testing.assert_close(columns(name, 32, dtype=dtype), columns(name, 32).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("n", [3, 7, 25, 99])
def test_hadamard_of_odd_size_is_refused_because_it_would_be_the_identity(n: int) -> None:
    with pytest.raises(ValueError, match="power of two") as caught:
        columns("hadamard", n)
    assert f"n={n}" in str(caught.value)
    assert "identity" in str(caught.value)


def test_hadamard_of_size_12_is_three_blocks_of_4() -> None:
    expected = torch.zeros(12, 12, dtype=torch.float64)
    for start in (0, 4, 8):
        expected[start : start + 4, start : start + 4] = columns("hadamard", 4)
    assert torch.equal(columns("hadamard", 12), expected)


def test_an_unknown_dictionary_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(ValueError, match="dct4") as caught:
        columns("dct4", 8)
    for name in ALL_NAMES:
        assert name in str(caught.value)


def test_random_is_a_function_of_seed_and_size_alone() -> None:
    torch.manual_seed(1)
    first = columns("random", 16, seed=3)
    state = torch.random.get_rng_state()
    second = columns("random", 16, seed=3)
    assert torch.equal(state, torch.random.get_rng_state()), "the user's random state must not move"
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert (first - columns("random", 16, seed=4)).abs().max() > 0.1
