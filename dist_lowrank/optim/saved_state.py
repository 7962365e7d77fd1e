"""The optimizer's side of saving and loading: torch's `state_dict` and `load_state_dict`, dtypes and shards kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_lowrank.optim.binding import BoundMatrix, BoundParameter
from dist_lowrank.optim.flat_state import cut_flat_state, gather_flat_state
from dist_lowrank.optim.shared_dictionary import with_keepers
from dist_lowrank.optim.state_dict import load_into, validate_state_dict, writable_if_fresh
from dist_lowrank.sharding.pieces import FlatPlace


class SavedState(torch.optim.Optimizer):
    """Part of `LowRankOptimizer`, whose binding and state it reads and replaces."""

    _state: Any
    _bound: dict[Tensor, BoundParameter]
    _bound_members: list[tuple[dict[str, Any], list[Tensor]]]
    _unchecked: list[tuple[str, Tensor]]
    _shards_loaded: bool
    _flat: dict[Tensor, FlatPlace]
    _matrices: Callable[[], list[BoundMatrix]]
    _check_group: Callable[[dict[str, Any]], None]
    bind: Callable[[], list[list[BoundParameter]]]

    def _cut_flat(self, incoming: dict[str, Any]) -> dict[str, Any]:
        """A state dict in which this rank's part stands for gathered state of flat tensors."""
        state = dict(incoming["state"])
        for parameter, index in self._indices_in(incoming).items():
            if parameter in self._flat and index in state:
                state[index] = cut_flat_state(self._bound[parameter], self._flat[parameter], state[index])
        return {**incoming, "state": state}

    def _indices_in(self, incoming: dict[str, Any]) -> dict[Tensor, int]:
        pairs = zip(self.param_groups, incoming["param_groups"], strict=False)
        return {p: index for group, saved in pairs for p, index in zip(group["params"], saved["params"], strict=False)}

    def flat_members(self) -> dict[Tensor, tuple[BoundParameter, FlatPlace]]:
        """What is known of the flat tensors that were declared."""
        self.bind()
        return {parameter: (self._bound[parameter], place) for parameter, place in self._flat.items()}

    def gather_flat_state(self, state: Mapping[Tensor, Mapping[str, Tensor]]) -> dict[Tensor, dict[str, Tensor]]:
        """The state of flat tensors in global shapes, the same on all ranks; empty without any. Collective."""
        self.bind()
        return {p: gather_flat_state(self._bound[p], place, state[p]) for p, place in self._flat.items() if p in state}

    def state_dict(self) -> dict[str, Any]:
        """As torch's; tensors only. Sharded state is in DTensors, of which each rank saves its part.

        What one rank saves of DTensors is that rank's alone; `full_state_dict` gathers.
        """
        self._drop_orphans()
        state_dict = super().state_dict()
        return {**state_dict, "state": {key: writable_if_fresh(state) for key, state in state_dict["state"].items()}}

    def _drop_orphans(self) -> None:
        """Forgets the state of parameters that were replaced."""
        known = {parameter for group in self.param_groups for parameter in group["params"]} | set(self._flat)
        for parameter in [each for each in self.state if each not in known]:
            del self._state[parameter]
            self._bound.pop(parameter, None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its dtypes (torch casts integers too to the parameter's dtype).

        Takes DTensors sharded as this optimizer's, or full tensors, of which each rank takes its part. Nothing is
        changed if anything does not fit.

        Raises:
            ValueError: state that this optimizer cannot follow, naming the parameter.
        """
        self._drop_orphans()
        kept, unchecked = self._state, self._unchecked
        saved: list[dict[str, Any]] = []

        def set_state_aside(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            matrices = [matrix for bound in self._bound.values() for matrix in bound.matrices]  # also others' experts
            incoming = with_keepers(matrices, self._cut_flat(incoming), self._indices_in(incoming))
            validate_state_dict(self.param_groups, kept, incoming)
            for group, saved_group in zip(self.param_groups, incoming["param_groups"], strict=False):
                self._check_group({**group, **saved_group})
            saved.extend(incoming["state"].get(i, {}) for group in incoming["param_groups"] for i in group["params"])
            # What the file does not say, such as options that came later, stays as it is.
            pairs = zip(self.param_groups, incoming["param_groups"], strict=False)
            filled = [{**group, **saved_group} for group, saved_group in pairs]
            filled += incoming["param_groups"][len(filled) :]
            return {**incoming, "state": {}, "param_groups": filled}

        def put_state_back(_: Any) -> None:
            self._state, self._unchecked = kept, unchecked
            load_into([p for group in self.param_groups for p in group["params"]], kept, saved)
            loaded = [value for state in saved for value in state.values()]
            self._shards_loaded = bool(self._flat) or any(isinstance(value, DTensor) for value in loaded)
            # The groups are new objects now; what is replaced in them from here on is to be noticed.
            self._bound_members = [(group, list(group["params"])) for group in self.param_groups]
            for matrix in self._matrices():
                matrix.previous_indices = None

        # torch casts state while loading, so it gets none: last before it, first after it.
        handles = [
            self.register_load_state_dict_pre_hook(set_state_aside),
            self.register_load_state_dict_post_hook(put_state_back, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
