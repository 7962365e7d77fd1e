"""A contiguous run of the elements of a row-major parameter, cut anywhere, as ZeRO and FSDP1 leave it on a rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class FlatSlice:
    """The elements `start` to `stop` of the flattened row-major parameter, as one rank holds them.

    What is said of rows is for matrices, `R x C`.
    """

    shape: tuple[int, ...]
    start: int
    stop: int

    def __post_init__(self) -> None:
        elements = math.prod(self.shape)
        if not 0 <= self.start <= self.stop <= elements:
            raise ValueError(
                f"flat slice: {self.start} to {self.stop} is not allowed; allowed: within 0 to {elements}, the "
                f"elements of a parameter of shape {self.shape}"
            )

    @property
    def first_row(self) -> int:
        return self.start // self.shape[1]

    @property
    def last_row(self) -> int:
        """One past the last matrix row that the slice touches; `first_row` if it is empty."""
        return self.first_row if self.start == self.stop else -(-self.stop // self.shape[1])

    @property
    def offset(self) -> int:
        """Of the slice's first element within its rows."""
        return self.start - self.first_row * self.shape[1]

    def overlap(self, row: int) -> tuple[int, int]:
        """Columns of a matrix row that the slice holds, as start and stop (equal: none)."""
        width = self.shape[1]
        start = max(self.start, row * width) - row * width
        return start, max(start, min(self.stop, (row + 1) * width) - row * width)

    def torn_rows(self) -> list[int]:
        """Matrix rows that it holds in part."""
        rows = dict.fromkeys((self.first_row, self.last_row - 1)) if self.stop > self.start else {}
        return [row for row in rows if self.overlap(row) != (0, self.shape[1])]

    def padded_rows(self, values: Tensor) -> Tensor:
        """The slice's values, zeros around them, as (rows touched, C)."""
        rows, width = self.last_row - self.first_row, self.shape[1]
        if self.stop - self.start == rows * width:
            return values.view(rows, width)
        padded = values.new_zeros(rows * width)
        padded[self.offset : self.offset + self.stop - self.start] = values
        return padded.view(rows, width)

    def cut(self, rows: Tensor) -> Tensor:
        """The slice's elements of the rows that it touches, flat."""
        return rows.reshape(-1)[self.offset : self.offset + self.stop - self.start]


def check_slices(shape: tuple[int, ...], slices: Sequence[FlatSlice]) -> None:
    """Raises ValueError unless slices, by rank, cover every element of a parameter exactly once, in order."""
    kind = "matrix" if len(shape) == 2 else "parameter"
    position = 0
    for k, each in enumerate(slices):
        if each.stop > each.start:
            if each.start != position:
                raise ValueError(
                    f"flat slices of a {kind} of shape {shape}: rank {k} starts at {each.start}; allowed: "
                    f"{position}, where the ranks before it end"
                )
            position = each.stop
    if position != math.prod(shape):
        raise ValueError(
            f"flat slices of a {kind} of shape {shape} end at {position}; allowed: {math.prod(shape)}, its last element"
        )
