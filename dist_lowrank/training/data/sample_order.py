"""Sample order: a stateless pseudo-random permutation of every epoch.

Shuffling with a generator needs an array as long as the data set and a state to save. Here the sample at position
`p` of an endless shuffled read is a pure function of `(p, length, seed)`: a small Feistel network permutes the
`rows x columns` grid that just covers `length` numbers, and a result outside `length` is permuted again until it
falls inside ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). So the position of
a run is one integer, memory is O(1), any rank can compute any part, and, as only integer arithmetic that is spelled
out here takes part, the order never changes with a library's version.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, the increment of splitmix64

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]


def sample_index(position: npt.ArrayLike, length: int, seed: int) -> Int64Array:
    """The sample at each position of an endless shuffled read of a data set.

    Positions `k * length` to `(k + 1) * length - 1` are epoch `k`: each sample once, in an order keyed by
    `(seed, k)`.

    Args:
        position: non-negative integers of any shape.
        length: number of samples in the data set.
        seed: any integer; its lowest 64 bits count.

    Returns:
        int64 of the shape of `position`, each in `[0, length)`.

    Raises:
        ValueError: `length` is below 1 or a position is negative.
    """
    position = np.asarray(position, dtype=np.int64)
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if position.size and position.min() < 0:
        raise ValueError(f"position must not be negative, got {position.min()}")
    epoch, place = np.divmod(position.reshape(-1), np.int64(length))
    key = _mix(_mix(_words(seed)) + epoch.astype(np.uint64))
    return _permute(place.astype(np.uint64), key, length).astype(np.int64).reshape(position.shape)


def shuffled(length: int, *key: int) -> Int64Array:
    """A permutation of `range(length)`, keyed by any integers, as int64 of shape (length,)."""
    mixed = _words(0)
    for part in key:
        mixed = _mix(_mix(mixed) + _words(part))
    return _permute(np.arange(length, dtype=np.uint64), np.repeat(mixed, length), length).astype(np.int64)


def _permute(place: UInt64Array, key: UInt64Array, length: int) -> UInt64Array:
    """Permute `range(length)`: each `place` under its own `key`; both of shape (m,)."""
    rows = math.isqrt(max(length - 1, 0)) + 1  # ceil(sqrt(length))
    columns = max(-(-length // rows), 1)  # so that rows * columns - length < rows: few walks
    index = _feistel(place, key, rows, columns)
    outside = np.flatnonzero(index >= length)
    while outside.size:  # ends: the walk follows a cycle of a bijection, and `place` itself lies inside
        index[outside] = _feistel(index[outside], key[outside], rows, columns)
        outside = outside[index[outside] >= length]
    return index


def _feistel(value: UInt64Array, key: UInt64Array, rows: int, columns: int) -> UInt64Array:
    """A bijection of `range(rows * columns)`: each round adds a keyed hash of one coordinate to the other."""
    row, column = np.divmod(value, np.uint64(columns))
    for number in range(1, _ROUNDS + 1):
        round_key = _mix(key + np.full_like(key, number) * _GOLDEN)
        if number % 2:
            row = (row + _mix(column ^ round_key) % np.uint64(rows)) % np.uint64(rows)
        else:
            column = (column + _mix(row ^ round_key) % np.uint64(columns)) % np.uint64(columns)
    return row * np.uint64(columns) + column


def _mix(value: UInt64Array) -> UInt64Array:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): a bijection that spreads every bit."""
    value = value + _GOLDEN  # arrays of uint64 wrap silently, which is the arithmetic wanted
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _words(integer: int) -> UInt64Array:
    return np.array([integer % 2**64], dtype=np.uint64)
