"""The subspace of the r columns that score highest in a dictionary that all matrices of a role share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dist_lowrank.dictionaries import DICTIONARIES, LearnedDictionary, check_transform
from dist_lowrank.optim.columns import ColumnBasis, ColumnChange, DictionaryColumns
from dist_lowrank.optim.options import check_choice, check_count, refuse
from dist_lowrank.optim.projections import Rotation
from dist_lowrank.optim.subspace import Change, Place
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.subspaces import RANKINGS


def columns_of(dictionary: str, group: Mapping[str, Any]) -> DictionaryColumns:
    """The columns of a dictionary, fixed or shared, with the options of a parameter group."""
    options = {key: group[key] for key in ("ranking", "transform", "materialize", "seed")}
    options["precision"] = group["transform_precision"]
    check_choice("dictionary", dictionary, (*DICTIONARIES, "shared"))
    if dictionary != "shared":
        return DictionaryColumns(dictionary, **options)
    check_count("dictionary_interval", group["dictionary_interval"])
    refresh_interval = group.get("refresh_interval", 1)
    check_count("refresh_interval", refresh_interval)
    if group["dictionary_interval"] % refresh_interval:
        # So that matrices choose anew whenever the dictionary changes.
        allowed = f"a multiple of refresh_interval={refresh_interval}, with dictionary='shared'"
        raise refuse("dictionary_interval", group["dictionary_interval"], allowed)
    if group.get("column_bias_correction") and group["transition"] != "reset":
        # Columns of one dictionary turn into mixtures of the next one's, so that none has an age.
        raise refuse("column_bias_correction", True, "False with dictionary='shared', or transition='reset'")
    return SharedColumns("shared", **options, dictionary_interval=group["dictionary_interval"])


@dataclass(frozen=True, slots=True)
class SharedColumns(DictionaryColumns):
    """Columns by score of the dictionary of a matrix's role (`dist_lowrank.optim.shared_dictionary`)."""

    dictionary_interval: int = 500

    def __post_init__(self) -> None:
        check_transform(self.dictionary, self.transform, self.materialize, self.precision)
        check_choice("ranking", self.ranking, RANKINGS)

    def check(self, form: TallForm) -> None:
        pass

    def scratch_elements(self, form: TallForm) -> int:
        # As an SVD's: matrix, vectors, their copies, LAPACK's workspace in float64; the Gram matrix of one role.
        return 16 * form.n**2

    def stored(self, state: Mapping[str, Tensor], place: Place) -> SharedBasis:
        before = place.role.previous if place.role is not None else None
        return SharedBasis(before or self._ready(place), state["indices"].long(), place.alone)

    def basis(self, place: Place, indices: Tensor) -> SharedBasis:
        return SharedBasis(self._ready(place), indices, place.alone)

    def _ready(self, place: Place) -> LearnedDictionary:
        assert place.role is not None
        assert place.role.current is not None
        return place.role.current


@dataclass(slots=True)
class SharedBasis(ColumnBasis):
    """Columns of one version of a dictionary."""

    dictionary: LearnedDictionary

    @property
    def vectors(self) -> Tensor:
        """(n, r)."""
        return self.dictionary.atoms[self.indices].t()

    def change_from(self, previous: ColumnBasis) -> Change:
        assert isinstance(previous, SharedBasis)
        if previous.dictionary is self.dictionary:
            return ColumnChange(previous.indices, self.indices, self.dictionary.n)
        return VersionChange(previous, self)


@dataclass(frozen=True, slots=True)
class VersionChange:
    """From columns of one version of a dictionary to columns of the next, by `D_old[:, I_old]^T D_new[:, I_new]`."""

    old: SharedBasis
    new: SharedBasis

    def carry(self, transition: str, first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
        Rotation(self.old.vectors, self.new.vectors).carry(transition, first, second)

    def return_dropped(self, coordinates: Tensor, momentum: Tensor) -> None:
        lacked = self.new.dictionary.transform(self.old.vectors.t())  # (r, n), in the coordinates of the new version
        lacked.index_fill_(1, self.new.indices, 0)
        coordinates.addmm_(momentum, lacked)
