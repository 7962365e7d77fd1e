"""The subspace of the r columns of a fixed dictionary that score highest; its state is r integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dist_lowrank.dictionaries import BLOCK_ELEMENTS, Dictionary, check_dictionary, check_transform, operand_dtype
from dist_lowrank.kernels import narrow_products
from dist_lowrank.optim.options import check_choice
from dist_lowrank.optim.state import StateTensor
from dist_lowrank.optim.subspace import Change, Choice, Place
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.sharding.rule import Rule
from dist_lowrank.subspaces import RANKINGS, column_scores, index_dtype, top_columns


@dataclass(frozen=True, slots=True)
class DictionaryColumns:
    """Columns of a dictionary by score, summed over all rows. Coordinates are those in the dictionary."""

    dictionary: str
    ranking: str = "l2"
    transform: str = "gemm"
    materialize: bool = True
    seed: int = 0  # of the `random` dictionary
    precision: str = "fp32"  # of operands

    uses_momentum: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_dictionary(self.dictionary)
        check_transform(self.dictionary, self.transform, self.materialize, self.precision)
        check_choice("ranking", self.ranking, RANKINGS)

    def operands(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of rows and directions, where arithmetic is in `dtype`."""
        return operand_dtype(self.dictionary, dtype, self.precision)

    def scratch_elements(self, form: TallForm) -> int:
        if self.precision == "bf16":  # blocks of both operands in wide
            return 2 * sum(min(lines * form.n, narrow_products.BLOCK_ELEMENTS) for lines in (form.rows, form.n))
        return 0 if self.materialize else 8 * min(form.rank * form.n, BLOCK_ELEMENTS)  # 64-bit integers and the entry

    def check(self, form: TallForm) -> None:
        check_dictionary(self.dictionary, form.n)

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        return {"indices": StateTensor(form.rank, index_dtype(form.n), "indices", sharded=False)}

    def statistics(self, form: TallForm, first: bool = False) -> list[int]:
        return [form.n]

    def coordinates(self, rows: Tensor, place: Place) -> Tensor:
        return self._ready(place).transform(rows)

    def stored(self, state: Mapping[str, Tensor], place: Place) -> ColumnBasis:
        return self.basis(place, state["indices"].long())

    def choose(
        self, coordinates: Tensor, state: Mapping[str, Tensor], place: Place, number: int, mean: Tensor | None
    ) -> Rule[Choice]:
        scores = yield column_scores(coordinates[place.owned], self.ranking)  # (n,)
        return self.chosen(scores, state, place, number)

    def chosen(self, scores: Tensor, state: Mapping[str, Tensor], place: Place, number: int) -> Choice:
        """By scores (n,), summed over ranks."""
        previous = state["indices"][: 0 if number == 0 or place.new_dictionary else None].clone()
        indices = top_columns(scores, place.form.rank)
        return Choice(self.basis(place, indices), scores[indices].sum() / scores.sum(), previous)

    def store(self, basis: ColumnBasis, state: Mapping[str, Tensor]) -> None:
        state["indices"].copy_(basis.indices)

    def basis(self, place: Place, indices: Tensor) -> ColumnBasis:
        """Of columns `indices` (r,), int64, ascending."""
        return ColumnBasis(self._ready(place), indices, place.alone)

    def _ready(self, place: Place) -> Dictionary:
        transform = self.transform
        if transform == "auto" and self.materialize and place.repeated:
            transform = "gemm"  # ranks that repeat the same work must round alike, so none may measure for itself
        return place.cache.get(
            self.dictionary,
            place.form.n,
            dtype=place.dtype,
            device=place.device,
            seed=self.seed,
            transform=transform,
            materialize=self.materialize,
            precision=self.precision,
        )


@dataclass(frozen=True, slots=True)
class PreviousColumns(DictionaryColumns):
    """Columns by their score at the step before, at the first step by that of its own gradient.

    Known before the gradient is, so that ranks need not sum the whole of it (`dist_lowrank.optim.gradient_sync`).
    """

    def state(self, form: TallForm, dtype: torch.dtype) -> Mapping[str, StateTensor]:
        scores = StateTensor(form.n, dtype, "other_state", sharded=False)
        return {**DictionaryColumns.state(self, form, dtype), "scores": scores}

    def foreseen(self, state: Mapping[str, Tensor], place: Place) -> Tensor:
        """The columns (r,) of the next step but the first."""
        return top_columns(state["scores"], place.form.rank)

    def choose(
        self, coordinates: Tensor, state: Mapping[str, Tensor], place: Place, number: int, mean: Tensor | None
    ) -> Rule[Choice]:
        scores = place.scores
        if scores is None:
            scores = yield column_scores(coordinates[place.owned], self.ranking)  # (n,)
        indices = top_columns(scores, place.form.rank) if number == 0 else self.foreseen(state, place)
        previous = state["indices"][: 0 if number == 0 else None].clone()
        state["scores"].copy_(scores)
        return Choice(self.basis(place, indices), scores[indices].sum() / scores.sum(), previous)


@dataclass(slots=True)
class ColumnBasis:
    """The columns at `indices` (r,), int64, ascending."""

    dictionary: Dictionary
    indices: Tensor
    keeps: bool = False  # the columns, from projecting to lifting
    _chosen: Tensor | None = field(default=None, init=False)

    def take(self, coordinates: Tensor) -> Tensor:
        if not coordinates.is_contiguous() and coordinates.t().is_contiguous():  # of the left side
            return coordinates.t().index_select(0, self.indices).t().contiguous()
        return coordinates.index_select(1, self.indices)

    def project(self, rows: Tensor) -> Tensor:
        if self.keeps and self._chosen is None:
            self._chosen = self.dictionary.chosen(self.indices)
        return self.dictionary.project(rows, self.indices, self._chosen)

    def replace(self, coordinates: Tensor, coefficients: Tensor, keep: float) -> None:
        coordinates.index_copy_(1, self.indices, coefficients * keep)

    def add_lifted(
        self, target: Tensor, coefficients: Tensor, *, decay: float, scale: float, columns: slice = slice(None)
    ) -> None:
        self.dictionary.add_lifted(
            target, coefficients, self.indices, decay=decay, scale=scale, columns=columns, chosen=self._chosen
        )

    def change_from(self, previous: ColumnBasis) -> Change:
        return ColumnChange(previous.indices, self.indices, self.dictionary.n)


@dataclass(frozen=True, slots=True)
class ColumnChange:
    """From one choice of columns of an orthonormal dictionary to another.

    `D_old^T D_new` has at most one 1 per row and column, so whatever it does to first moments, its element-wise square
    does to second ones: columns keep their moments wherever they stand, new ones start at zero.
    """

    old: Tensor  # (r,), int64, ascending
    new: Tensor
    n: int

    def carry(self, transition: str, first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
        tensors = [*first, *second]
        if transition == "keep":
            return
        if transition == "reset":
            for tensor in tensors:
                tensor.zero_()
            return
        slot = torch.full((self.n,), -1, dtype=torch.int64, device=self.new.device)
        slot[self.old] = torch.arange(self.old.numel(), device=self.new.device)
        source = slot[self.new]  # (r,): where a column was, -1 if it was not chosen
        fresh, source = source < 0, source.clamp(min=0)
        for tensor in tensors:
            torch.where(fresh, tensor.new_zeros(()), tensor.index_select(-1, source), out=tensor)

    def return_dropped(self, coordinates: Tensor, momentum: Tensor) -> None:
        coordinates.index_add_(1, self.old, momentum.masked_fill(torch.isin(self.old, self.new), 0))
