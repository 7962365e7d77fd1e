"""The order of samples: a keyed permutation of each epoch that needs no memory and never changes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lowrank.training.data.sample_order import sample_index, shuffled

UNHURRIED = settings(deadline=None)  # on a busy machine a slow example is no failure
LENGTHS = st.integers(1, 3000)
SEEDS = st.integers(0, 2**64 - 1)
EPOCHS = st.integers(0, 10**6)

GOLDEN_TWO_EPOCHS_OF_TEN = [2, 4, 7, 9, 6, 0, 5, 8, 1, 3, 4, 7, 3, 0, 9, 1, 6, 5, 2, 8]
GOLDEN_START_OF_TWENTY_THOUSAND = [14217, 9968, 9549, 15551, 17751, 14779]
GOLDEN_SHUFFLE_OF_EIGHT = [4, 0, 6, 2, 7, 1, 3, 5]


def epoch_order(epoch: int, length: int, seed: int) -> np.ndarray:
    return sample_index(np.arange(epoch * length, (epoch + 1) * length), length, seed)


@UNHURRIED
@given(length=LENGTHS, seed=SEEDS, epoch=EPOCHS)
def test_an_epoch_has_each_sample_once_for_any_length_and_key(length, seed, epoch):
    assert np.array_equal(np.sort(epoch_order(epoch, length, seed)), np.arange(length))


@UNHURRIED
@given(length=LENGTHS, key=st.lists(st.integers(-(2**63), 2**63), max_size=4))
def test_shuffled_is_a_permutation_for_any_key(length, key):
    assert np.array_equal(np.sort(shuffled(length, *key)), np.arange(length))


@UNHURRIED
@given(length=st.integers(50, 3000), seed=SEEDS, epoch=EPOCHS)
def test_epochs_and_seeds_have_orders_of_their_own(length, seed, epoch):
    order = epoch_order(epoch, length, seed)
    assert not np.array_equal(order, epoch_order(epoch + 1, length, seed))
    assert not np.array_equal(order, epoch_order(epoch, length, seed ^ 1))
    assert not np.array_equal(order, np.arange(length))


@UNHURRIED
@given(
    length=LENGTHS,
    seed=SEEDS,
    start=st.integers(0, 10**9),
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=20),
)
def test_the_order_does_not_depend_on_how_positions_are_grouped(length, seed, start, parts):
    whole = sample_index(np.arange(start, start + sum(parts)), length, seed)
    edges = start + np.cumsum([0, *parts])
    pieces = [sample_index(np.arange(*edge), length, seed) for edge in pairwise(edges)]
    assert np.array_equal(whole, np.concatenate(pieces))
    assert whole[-1] == sample_index(int(edges[-1]) - 1, length, seed)


@settings(max_examples=20, deadline=None)
@given(exponent=st.integers(20, 61), seed=SEEDS)
def test_huge_data_sets_need_no_memory_and_samples_stay_in_range(exponent, seed):
    length = 2**exponent + 12345
    index = sample_index(np.arange(1000), length, seed)
    assert index.min() >= 0
    assert index.max() < length
    assert len(np.unique(index)) == 1000


def test_every_sample_is_equally_likely_at_every_position():
    length, epochs = 12, 24_000
    orders = sample_index(np.arange(length * epochs), length, seed=5).reshape(epochs, length)
    for position in range(length):
        counts = np.bincount(orders[:, position], minlength=length)
        chi_squared = ((counts - epochs / length) ** 2 / (epochs / length)).sum()
        assert chi_squared < 40  # 11 degrees of freedom: exceeded by chance once in 30,000 times


def test_neighbours_in_the_order_are_not_neighbours_in_the_data():
    length = 10_000
    order = epoch_order(0, length, seed=3)
    steps = np.diff(order)
    assert (np.abs(steps) <= 10).mean() < 0.01  # 0.002 is expected of a random order
    assert abs(np.corrcoef(order, np.arange(length))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05


def test_the_order_is_the_one_that_saved_runs_were_trained_in():
    assert sample_index(np.arange(20), 10, seed=0).tolist() == GOLDEN_TWO_EPOCHS_OF_TEN
    assert sample_index(np.arange(6), 20_000, seed=1234).tolist() == GOLDEN_START_OF_TWENTY_THOUSAND
    assert shuffled(8, 1, 2, 3).tolist() == GOLDEN_SHUFFLE_OF_EIGHT


@pytest.mark.parametrize(("position", "length", "named"), [(0, 0, "length"), (-1, 10, "position")])
def test_impossible_arguments_are_refused_by_name(position, length, named):
    with pytest.raises(ValueError, match=named):
        sample_index(position, length, seed=0)
