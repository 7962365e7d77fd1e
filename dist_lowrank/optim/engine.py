"""The engine: one `step()` for every recipe and every layout.

    for each wave of matrices that fits the workspace: update (see `dist_lowrank.optim.wave`)
    dense parameters: AdamW

An optimizer is a subclass that says which recipe a parameter group follows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dist_lowrank.dictionaries import DictionaryCache
from dist_lowrank.optim.binding import (
    BoundGroup,
    BoundMatrix,
    FlatPlace,
    bind_group,
    check_loaded_shards,
    check_replicas,
    is_trained,
    structure_of,
)
from dist_lowrank.optim.dense import DenseOptions, dense_step, dense_waves
from dist_lowrank.optim.options import check_count, check_number
from dist_lowrank.optim.recipe import Recipe
from dist_lowrank.optim.state_dict import load_into, validate_state_dict
from dist_lowrank.optim.wave import cut_waves, update_wave, verify_columns
from dist_lowrank.sharding.exchanged import FlatSlice
from dist_lowrank.sharding.layouts import local

WORKSPACE_BYTES = 512 * 2**20
VERIFY_EVERY = 100  # steps


class LowRankOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here; subclasses define `recipe` and `dense_options`."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        process_group: dist.ProcessGroup | None = None,
        workspace_bytes: int = WORKSPACE_BYTES,
        verify_every: int = VERIFY_EVERY,
    ) -> None:
        check_count("workspace_bytes", workspace_bytes)
        if verify_every != 0:
            check_count("verify_every", verify_every)
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise ValueError("process_group: this rank is not in it; allowed: a group that this rank is a member of")
        self.process_group = process_group
        self.workspace_bytes = workspace_bytes
        self.verify_every = verify_every
        self._steps = 0  # of this object; state counts its own
        self._flat: dict[Tensor, FlatPlace] = {}
        self._forget_binding()
        super().__init__(params, {"low_rank": True, **defaults})

    def __getstate__(self) -> dict[str, Any]:
        kept = ("process_group", "workspace_bytes", "verify_every", "_steps", "_flat")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget_binding()
        self._state = state.pop("state", {})
        super().__setstate__(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> LowRankOptimizer:
        for group in (self.process_group, *(place.group for place in self._flat.values())):
            memo[id(group)] = group  # process groups cannot be copied, and need not be
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def _forget_binding(self) -> None:
        self._bound: list[BoundGroup] | None = None
        self._bound_parameters: list[tuple[int, bool]] = []
        self._bound_members: list[tuple[dict[str, Any], list[Tensor]]] = []  # groups and what they held
        self._unchecked: list[tuple[str, Tensor]] = []  # replicated parameters not yet compared between ranks
        self._shards_loaded = False  # and not yet compared between ranks
        self._dictionaries = DictionaryCache()
        self._replicas: dict[str, DeviceMesh | None] = {}

    # What a subclass says -----------------------------------------------------------------------------------------

    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The low-rank path of a group, from its options; raises ValueError for options that are not allowed."""
        raise NotImplementedError

    def dense_options(self, group: dict[str, Any]) -> DenseOptions:
        """The dense path of a group, from its options; raises ValueError for options that are not allowed."""
        raise NotImplementedError

    # The step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates all parameters that have a gradient. `p.grad` is only read.

        Collective over the ranks that share a parameter; each of them must have gradients for the same parameters.

        Raises:
            LayoutError: a matrix is sharded in a way that cannot be updated exactly.
            ValueError: replicas of plain parameters differ (checked at the first step), or an option that fixes the
                shapes of state was changed.
            RuntimeError: ranks have chosen different columns, or hold the shards of another rank.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = list(zip(self.param_groups, self.bind(), strict=True))
        self._check_before_step()
        state = self._state
        jobs, device_types = [], set()
        for group, bound in groups:
            recipe = self.recipe(group)
            if structure_of(recipe) != bound.structure:
                raise ValueError(
                    f"rank, side, dictionary: {structure_of(recipe)} is not allowed after state was made with "
                    f"{bound.structure}; allowed: the same"
                )
            jobs += [(matrix, recipe) for matrix in bound.matrices if matrix.parameter.grad is not None]
            device_types |= {parameter.device.type for parameter in group["params"]}
        with _no_autocast(device_types):
            for wave in cut_waves(jobs, self.workspace_bytes):
                update_wave(wave, state, self._dictionaries)
        for group, bound in groups:
            dense = [parameter for parameter in bound.dense if parameter.tensor.grad is not None]
            for parameters in dense_waves(dense, self.workspace_bytes):
                dense_step(parameters, [state[p.tensor] for p in parameters], self.dense_options(group))
        self._steps += 1
        if self.verify_every and self._steps % self.verify_every == 0:
            verify_columns([matrix for _, bound in groups for matrix in bound.matrices], state)
        return loss

    def _check_before_step(self) -> None:
        """What can only be told by comparing ranks, once after binding and after loading."""
        if any(p.grad is not None and p.grad.is_sparse for group in self.param_groups for p in group["params"]):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        unchecked, self._unchecked = self._unchecked, []
        if unchecked:
            replicas = self._replica_mesh(unchecked[0][1].device)
            if replicas is not None and replicas.size() > 1:
                check_replicas(unchecked, replicas.get_group())
        if self._shards_loaded:
            self._shards_loaded = False
            check_loaded_shards([matrix for bound in self.bind() for matrix in bound.matrices], self._state)

    # Binding and state --------------------------------------------------------------------------------------------

    def bind(self) -> list[BoundGroup]:
        """Reads the layout of every parameter and creates all missing state; `step` and the rest call it.

        Does nothing while parameters and state are those that it knows. Communicates nothing.

        Raises:
            LayoutError: a matrix is sharded over several mesh dimensions, or otherwise than in blocks.
        """
        parameters = [(p, is_trained(p)) for group in self.param_groups for p in group["params"]]
        seen = [(id(parameter), trained) for parameter, trained in parameters]
        complete = all(self._state.get(parameter) for parameter, trained in parameters if trained)
        if self._bound is not None and complete and seen == self._bound_parameters:
            return self._bound
        self._forget_replaced()
        bound, position = [], 0
        with torch.inference_mode(False), torch.no_grad():
            for group in self.param_groups:
                recipe = self.recipe(group)
                bound.append(bind_group(group, position, recipe, self._state, self._replica_mesh, self._flat))
                position += len(group["params"])
        self._bound, self._bound_parameters = bound, seen
        self._bound_members = [(group, list(group["params"])) for group in self.param_groups]
        self._unchecked += [fresh for group in bound for fresh in group.fresh_replicas]
        return bound

    def _forget_replaced(self) -> None:
        """Drops the state of parameters that a wrapper has replaced, and comparisons that were still to be made.

        Otherwise it would keep the whole weights alive beside the shards. Parameters of a group that is absent are
        kept: there are wrappers that step with one group at a time.
        """
        present = {parameter for group in self.param_groups for parameter in group["params"]}
        groups = {id(group) for group in self.param_groups}
        held = {parameter for group, members in self._bound_members if id(group) in groups for parameter in members}
        for parameter in held - present:
            self._state.pop(parameter, None)
        self._unchecked = [(name, p) for name, p in self._unchecked if p in present or p not in held]

    @property
    def state(self) -> Any:
        """Per-parameter state. Looking at it binds, so that nobody sees a state that is still to be created.

        (torch.distributed.checkpoint fills an empty state by a step on zero gradients, which would choose columns.)
        """
        self.bind()
        return self._state

    @state.setter
    def state(self, value: Any) -> None:
        self._state = value

    def declare_flat_slices(self, slices: Mapping[Tensor, Sequence[FlatSlice]], group: dist.ProcessGroup) -> None:
        """Says which 1-D parameters are flat slices of larger ones, cut anywhere, as ZeRO and FSDP1 make them.

        Args:
            slices: by parameter, the slice of each rank of `group`; this rank's has the parameter's number of elements.

        Raises:
            ValueError: a slice that is not the parameter's.
        """
        for parameter, by_rank in slices.items():
            own = by_rank[dist.get_rank(group)]
            if len(by_rank) != dist.get_world_size(group) or parameter.shape != (own.stop - own.start,):
                raise ValueError(
                    f"flat slices: {len(by_rank)} slices, and one of {own.stop - own.start} elements for a parameter "
                    f"of shape {tuple(parameter.shape)}; allowed: one per rank, of the parameter's size"
                )
            self._flat[parameter] = FlatPlace(tuple(by_rank), group)
        self._bound = None

    @property
    def holds_flat_slices(self) -> bool:
        return bool(self._flat)

    def _replica_mesh(self, device: torch.device) -> DeviceMesh | None:
        """The 1-D mesh of the ranks that hold copies of plain parameters; None without torch.distributed."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        if device.type not in self._replicas:
            group = self.process_group or dist.group.WORLD
            assert group is not None
            self._replicas[device.type] = DeviceMesh.from_group(group, device.type)
        return self._replicas[device.type]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()  # a refused group leaves the optimizer as it was
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        for rate in ("lr", "dense_lr"):  # only here: schedulers may do with them what they like
            if rate in group:
                check_number(rate, group[rate])
        self.recipe(group)
        self.dense_options(group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; tensors only. Sharded state is in DTensors, of which each rank saves its part.

        What one rank saves of DTensors is that rank's alone; `full_state_dict` gathers.
        """
        self._drop_orphans()
        return super().state_dict()

    def _drop_orphans(self) -> None:
        """Forgets the state of parameters that were replaced."""
        known = {parameter for group in self.param_groups for parameter in group["params"]}
        for parameter in [each for each in self.state if each not in known]:
            del self._state[parameter]

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
            validate_state_dict(self.param_groups, kept, incoming)
            for group, saved_group in zip(self.param_groups, incoming["param_groups"], strict=False):
                self._check_group({**group, **saved_group})
            saved.extend(incoming["state"].get(i, {}) for group in incoming["param_groups"] for i in group["params"])
            return {**incoming, "state": {}}

        def put_state_back(_: Any) -> None:
            self._state, self._unchecked = kept, unchecked
            load_into([p for group in self.param_groups for p in group["params"]], kept, saved)
            self._shards_loaded = any(isinstance(value, DTensor) for state in saved for value in state.values())
            self.bind()  # the groups are new objects now; what is replaced in them from here on is to be noticed
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

    # What it holds ------------------------------------------------------------------------------------------------

    def memory_bytes(self) -> dict[str, int]:
        """Bytes that this rank holds, by cause; the causes are disjoint and their sum is all of the state."""
        totals = dict.fromkeys(("moments", "dense_moments", "indices", "error_feedback", "other_state"), 0)
        for group, bound in zip(self.param_groups, self.bind(), strict=True):
            recipe = self.recipe(group)
            for matrix in bound.matrices:
                specs = recipe.state(matrix.layout.form, matrix.dtype)
                for key, tensor in self._state[matrix.parameter].items():
                    cause = specs[key].cause if key in specs else "other_state"
                    totals[cause] += local(tensor).untyped_storage().nbytes()
            for parameter in bound.dense:
                for key, tensor in self._state[parameter.tensor].items():
                    cause = "other_state" if key == "step" else "dense_moments"
                    totals[cause] += local(tensor).untyped_storage().nbytes()
        return {**totals, "dictionary": self._dictionaries.storage_bytes}

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
                indices = local(self.state[matrix.parameter]["indices"]).long()
                stayed = torch.isin(indices, matrix.previous_indices.long()).sum()
                turnover[matrix.name] = 1 - int(stayed) / len(indices)
        return turnover

    def column_age(self) -> dict[str, float]:
        """By parameter name: the mean age of the chosen columns, in updates since they were chosen, this one included.

        Only of matrices with `column_bias_correction`, which alone keeps ages: no state is kept for this. With
        `transition="keep"` these are ages of slots, with `"reset"` updates since the last refresh.
        """
        states = {matrix.name: self.state[matrix.parameter] for matrix in self._matrices()}
        return {
            name: float(local(state["age"]).double().mean())
            for name, state in states.items()
            if "age" in state and state["step"] > 0
        }

    def _matrices(self) -> list[BoundMatrix]:
        return [matrix for bound in self._bound or [] for matrix in bound.matrices]


@contextmanager
def _no_autocast(device_types: Iterable[str]) -> Iterator[None]:
    """The update's arithmetic is its own affair, also when `step` is called inside autocast."""
    with ExitStack() as stack:
        for device_type in device_types:
            if device_type in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
