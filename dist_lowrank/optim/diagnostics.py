"""What an optimizer can tell about itself: the bytes that it holds, and how the chosen directions fare."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.dictionaries import DictionaryCache
from dist_lowrank.optim.binding import BoundMatrix, BoundParameter
from dist_lowrank.sharding.layouts import local
from dist_lowrank.sharding.pieces import FlatPlace


class Diagnostics:
    """Part of `LowRankOptimizer`, from whose state it reads; no method communicates."""

    state: Any
    _state: Any
    _bound: dict[Tensor, BoundParameter]
    _flat: dict[Tensor, FlatPlace]
    _dictionaries: DictionaryCache
    bind: Callable[[], list[list[BoundParameter]]]

    def memory_bytes(self) -> dict[str, int]:
        """Bytes that this rank holds, by cause; the causes are disjoint and their sum is all that is held."""
        return {cause: _storage_bytes(tensors) for cause, tensors in self.memory_tensors().items()}

    def memory_tensors(self) -> dict[str, list[Tensor]]:
        """All tensors that this optimizer holds on this rank between steps, by cause; of DTensors the local ones.

        Causes are those that parts of recipes give to their state, `dense_moments`, `shared_dictionary`,
        `other_state` (counters of steps), `dictionary` (the cache of fixed ones) and `diagnostics` (what
        `captured_energy` and `column_turnover` tell).
        """
        causes_of_state = ("moments", "dense_moments", "indices", "projection", "shared_dictionary", "error_feedback")
        found: dict[str, list[Tensor]] = {cause: [] for cause in (*causes_of_state, "other_state")}
        held = {bound.parameter: bound for members in self.bind() for bound in members}
        held |= {p: self._bound[p] for p in self._flat if p in self._bound}  # DeepSpeed empties groups between steps
        diagnostics = []
        for bound in held.values():
            causes: dict[str, str] = {}
            for matrix in bound.matrices:
                causes |= {matrix.piece.prefix + key: spec.cause for key, spec in matrix.specs.items()}
                if matrix.role is not None:
                    causes[matrix.role.key] = "shared_dictionary"
                diagnostics += [each for each in (matrix.captured_energy, matrix.previous_indices) if each is not None]
            for dense in bound.dense:
                causes |= {dense.piece.prefix + key: "dense_moments" for key in ("exp_avg", "exp_avg_sq")}
            for key, tensor in self._state[bound.parameter].items():
                found[causes.get(key, "other_state")].append(local(tensor))
        return {**found, "dictionary": self._dictionaries.tensors(), "diagnostics": diagnostics}

    def captured_energy(self) -> dict[str, float]:
        """By parameter name: the share of the score that the columns chosen last hold, at the last refresh.

        The score is of what was projected: the gradient, with what error feedback or momentum added to it. With
        `ranking="l2"` it is the energy, and the share is at least r / n. NaN where there was nothing to project.
        """
        return {
            matrix.name: float(matrix.captured_energy)
            for matrix in self._matrices()
            if matrix.captured_energy is not None
        }

    def column_turnover(self) -> dict[str, float]:
        """By parameter name: the share of the chosen columns that the last refresh brought in.

        1 after the first choice. Empty before it, and between loading a state and the next refresh.
        """
        turnover = {}
        for matrix in self._matrices():
            if matrix.previous_indices is not None:
                indices = matrix.state(self.state[matrix.parameter])["indices"].long()
                stayed = torch.isin(indices, matrix.previous_indices.long()).sum()
                turnover[matrix.name] = 1 - int(stayed) / len(indices)
        return turnover

    def column_age(self) -> dict[str, float]:
        """By parameter name: the mean age of the chosen columns, in updates since they were chosen, this one included.

        Only of matrices with `column_bias_correction`, which alone keeps ages: no state is kept for this. With
        `transition="keep"` these are ages of slots, with `"reset"` updates since the last refresh.
        """
        states = {matrix.name: matrix.state(self.state[matrix.parameter]) for matrix in self._matrices()}
        return {
            name: float(state["age"].double().mean())
            for name, state in states.items()
            if "age" in state and state["step"] > 0
        }

    def _matrices(self) -> list[BoundMatrix]:
        """Of which this rank has a share."""
        return [matrix for bound in self._bound.values() for matrix in bound.matrices if matrix.present]


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())
