"""The engine: one `step()` for every recipe and every layout.

    waves of matrices: update (see `dist_lowrank.optim.wave`)
    dense parameters: AdamW

Two of these that fit the workspace take turns: one computes while the other waits for its collectives.

An optimizer is a subclass that says which recipe a parameter group follows.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dist_lowrank.dictionaries import DictionaryCache
from dist_lowrank.optim.agreement import agree_on_gradients, check_not_in_backward
from dist_lowrank.optim.binding import (
    BoundParameter,
    bind_parameter,
    canonical_name,
    check_loaded_shards,
    check_replicas,
    is_trained,
    structure_of,
)
from dist_lowrank.optim.capturable import check_capturable, refuse_capture
from dist_lowrank.optim.dense import DenseOptions, copies_bytes, dense_options, dense_step, dense_waves
from dist_lowrank.optim.diagnostics import Diagnostics
from dist_lowrank.optim.flat_state import cut_tensors
from dist_lowrank.optim.given import GivenParameters
from dist_lowrank.optim.options import PATH_OPTIONS, check_choice, check_count, check_number, check_path_options
from dist_lowrank.optim.recipe import Recipe
from dist_lowrank.optim.saved_state import SavedState
from dist_lowrank.optim.shared_dictionary import dictionaries_of_step, join_roles, shares_dictionary
from dist_lowrank.optim.wave import Job, count_steps, cut_waves, no_autocast, update_waves, verify_columns
from dist_lowrank.sharding.pieces import FlatPart, FlatPlace, check_parts
from dist_lowrank.sharding.turns import Activity, at_once, take_turns

WORKSPACE_BYTES = 512 * 2**20
VERIFY_EVERY = 100  # steps


class LowRankOptimizer(Diagnostics, SavedState, ABC):
    """Base of all optimizers here; subclasses define `recipe`.

    Options of a parameter group that say which matrices its parameters consist of:
        low_rank: False puts all of the group on the dense path.
        higher_dims: what to do with parameters of more than two dimensions: `dense`; `stack`, an expert stack
            (E, R, C) is E matrices, each with columns of its own; `flatten`, a convolution (out, ...) is a matrix
            (out, rest).
        split: sizes into which each matrix is split along `split_dim` (0 or 1; default 0), each a matrix of its own:
            fused QKV or gate-up weights. Where that dimension is the sharded one, rows move to even blocks and back
            at each step.
        role: with `dictionary="shared"`: what the group's matrices share a dictionary as; by default their names say
            it (`dist_lowrank.optim.roles`).
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        process_group: dist.ProcessGroup | None = None,
        workspace_bytes: int = WORKSPACE_BYTES,
        verify_every: int = VERIFY_EVERY,
        agree_on_gradients: bool = True,
    ) -> None:
        check_count("workspace_bytes", workspace_bytes)
        check_choice("agree_on_gradients", agree_on_gradients, (False, True))
        if verify_every != 0:
            check_count("verify_every", verify_every)
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise ValueError("process_group: this rank is not in it; allowed: a group that this rank is a member of")
        self.process_group = process_group
        self.workspace_bytes = workspace_bytes
        self.verify_every = verify_every
        self.agree_on_gradients = agree_on_gradients
        self._steps = 0  # of this object; state counts its own
        self._flat: dict[Tensor, FlatPlace] = {}
        self._positions: dict[str, int] = {}  # of matrices by name, in the order in which they were bound first
        self.given = GivenParameters()  # and not by DeepSpeed put in their place
        self._forget_binding()
        super().__init__(params, {**PATH_OPTIONS, **defaults})

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "process_group",
            "workspace_bytes",
            "verify_every",
            "agree_on_gradients",
            "_steps",
            "_flat",
            "_positions",
        )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget_binding()
        self._state = state.pop("state", {})
        super().__setstate__(state)
        known: GivenParameters | None = getattr(self, "given", None)  # loading comes here too, copying without it
        self.given = known or GivenParameters()
        self.given.remember(self.param_groups, only_known=known is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> LowRankOptimizer:
        for group in (self.process_group, *(place.group for place in self._flat.values())):
            memo[id(group)] = group  # process groups cannot be copied, and need not be
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def _forget_binding(self) -> None:
        self._bound: dict[Tensor, BoundParameter] = {}
        self._bound_members: list[tuple[dict[str, Any], list[Tensor]]] = []  # groups and what they held
        self._unchecked: list[tuple[str, Tensor]] = []  # replicated parameters not yet compared between ranks
        self._shards_loaded = False  # and not yet compared between ranks
        self._dictionaries = DictionaryCache()
        self._replicas: dict[str, DeviceMesh | None] = {}

    # What a subclass says -----------------------------------------------------------------------------------------

    @abstractmethod
    def recipe(self, group: dict[str, Any]) -> Recipe:
        """The path of a group's matrices, from its options; raises ValueError for options that are not allowed."""

    def dense_options(self, group: dict[str, Any]) -> DenseOptions:
        """The dense path of a group, from its options; raises ValueError for options that are not allowed."""
        return dense_options(group, of_its_own="dense_betas" in self.defaults)

    # The step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates all parameters that have a gradient. `p.grad` is only read.

        Collective over the ranks that share a parameter. Where only some of them have a gradient of a sharded
        parameter, the others count as zero.

        Raises:
            LayoutError: a matrix is sharded in a way that cannot be updated exactly.
            ValueError: replicas of plain parameters differ (checked at the first step), or an option that fixes the
                shapes of state was changed.
            RuntimeError: ranks have chosen different columns, or hold the shards of another rank, or only some
                replicas have a gradient, or ranks share parameters and the step is called during a backward pass.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._only_warms_up():
            return loss
        refuse_capture(self.param_groups)
        groups = list(zip(self.param_groups, self.bind(), strict=True))
        everything = [bound for _, members in groups for bound in members]
        self._check_before_step(everything)
        active = agree_on_gradients(everything, self.agree_on_gradients)
        state, jobs, dense = self._state, [], []
        for group, members in groups:
            recipe = self.recipe(group)
            updated = [bound for bound in members if bound.parameter in active]
            structure = structure_of(group)
            for bound in updated:
                for option in [each for each in structure if structure[each] != bound.structure[each]]:
                    raise ValueError(
                        f"{option}: {structure[option]!r} is not allowed after state was made with "
                        f"{bound.structure[option]!r}; allowed: the same"
                    )
                jobs += self.jobs(recipe, bound)
            dense.append((self.dense_options(group), [each for bound in updated for each in bound.dense]))
        count_steps(jobs, state)
        learning = dictionaries_of_step(jobs, self._matrices(), state, self._dictionaries, self.workspace_bytes)
        with no_autocast({bound.parameter.device.type for bound in everything}), learning as kept_bytes:
            workspace_bytes = self.workspace_bytes - kept_bytes
            updates = update_waves(cut_waves(jobs, workspace_bytes), state, self._dictionaries)
            for options, parameters in dense:
                for part in dense_waves(parameters, workspace_bytes):
                    step = partial(dense_step, part, [each.state(state[each.tensor]) for each in part], options)
                    updates.append(Activity(at_once(step), partial(copies_bytes, part)))
            take_turns(updates, workspace_bytes)
        self._steps += bool(jobs)  # DeepSpeed steps group by group
        if jobs and self.verify_every and self._steps % self.verify_every == 0:
            verify_columns(self._matrices(), state)
        return loss

    def jobs(self, recipe: Recipe, bound: BoundParameter) -> list[Job]:
        """The matrices of a bound parameter, each with its recipe."""
        return [(matrix, recipe.at(matrix.position, len(self._positions))) for matrix in bound.matrices]

    @torch.no_grad()  # else local tensors of DTensors are views
    def resting_state(self) -> list[Tensor]:
        """This rank's state that may be dormant (`dist_lowrank.optim.dormant`): awake, it can be read into."""
        state = self.state  # binds
        owners = [(matrix, matrix.state(state[matrix.parameter])) for matrix in self._matrices()]
        return [own[key] for matrix, own in owners for key, spec in matrix.specs.items() if spec.dormant]

    def _check_before_step(self, everything: Sequence[BoundParameter]) -> None:
        """What can only be told at a step; and, once after binding and after loading, by comparing ranks."""
        check_not_in_backward(everything)
        if any(bound.parameter.grad is not None and bound.parameter.grad.is_sparse for bound in everything):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        unchecked, self._unchecked = self._unchecked, []
        if unchecked:
            replicas = self._replica_mesh(unchecked[0][1].device)
            if replicas is not None and replicas.size() > 1:
                check_replicas(unchecked, replicas.get_group())
        if self._shards_loaded:
            self._shards_loaded = False
            tensors = [tensor for bound in everything for tensor in self._state[bound.parameter].values()]
            flat = [
                (self._flat[bound.parameter].group, tensor)
                for bound in everything
                if bound.parameter in self._flat
                for tensor in cut_tensors(bound, self._state[bound.parameter])
            ]
            check_loaded_shards([tensor for tensor in tensors if isinstance(tensor, DTensor)], flat)

    # Binding and state --------------------------------------------------------------------------------------------

    def bind(self) -> list[list[BoundParameter]]:
        """Reads the layouts of parameters and creates all missing state; `step` and the rest call it.

        Does nothing for parameters whose state it knows. Communicates nothing.

        Returns:
            What is known of the parameters of each group, but for frozen ones.

        Raises:
            LayoutError: a matrix is sharded over several mesh dimensions, or otherwise than in blocks.
        """
        by_group, position = [], 0
        known = all(p in self._bound for group in self.param_groups for p in group["params"] if is_trained(p))
        if not known:
            self._forget_replaced()
        for group in self.param_groups:
            parameters = group["params"]
            by_group.append(
                [
                    self._bind_parameter(parameter, group, index, position + index)
                    for index, parameter in enumerate(parameters)
                    if is_trained(parameter)
                ]
            )
            position += len(parameters)
            matrices = [matrix for bound in by_group[-1] for matrix in bound.matrices]
            may_share = "shared" in (group.get("dictionary"), group.get("subspace"))  # else no recipe need be made
            if matrices and may_share and shares_dictionary(self.recipe(group)):
                with torch.inference_mode(False):
                    join_roles(matrices, group["role"], self._state)
        if not known:
            self._bound_members = [(group, list(group["params"])) for group in self.param_groups]
        return by_group

    def _forget_replaced(self) -> None:
        """Drops the state of parameters that a wrapper has replaced, and comparisons that were still to be made.

        Otherwise it would keep the whole weights alive beside the shards. Parameters of a group that is absent are
        kept, and flat tensors: DeepSpeed steps with one group at a time.
        """
        present = {parameter for group in self.param_groups for parameter in group["params"]}
        groups = {id(group) for group in self.param_groups}
        held = {parameter for group, members in self._bound_members if id(group) in groups for parameter in members}
        for parameter in held - present - set(self._flat):
            self._state.pop(parameter, None)
            self._bound.pop(parameter, None)
        self._unchecked = [(name, p) for name, p in self._unchecked if p in present or p not in held]

    def _bind_parameter(self, parameter: Tensor, group: dict[str, Any], index: int, position: int) -> BoundParameter:
        """What is known of a parameter at an index of its group, and at a position among all."""
        bound, state = self._bound.get(parameter), self._state.get(parameter)
        if bound is not None and state:
            return bound
        names = group.get("param_names") or []
        named = len(names) == len(group["params"])
        name = names[index] if named else self.given.name(parameter) or f"parameter_{position}"
        name, place = canonical_name(name), self._flat.get(parameter)
        plain = place is None and not isinstance(parameter, DTensor)
        replicas = self._replica_mesh(parameter.device) if plain else None
        with torch.inference_mode(False), torch.no_grad():
            bound = bind_parameter(name, parameter, group, self.recipe(group), state or {}, replicas, place)
        if place is None:
            self.given.refuse_flat(parameter)
        if not state:
            self._state[parameter] = bound.fresh_state
            if plain:
                self._unchecked.append((name, parameter))
        bound.fresh_state = {}
        for matrix in bound.matrices:
            matrix.position = self._positions.setdefault(matrix.name, len(self._positions))
        self._bound[parameter] = bound
        return bound

    def _only_warms_up(self) -> bool:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        unseen = [each for each in parameters if each not in self._bound and each not in self._flat]
        return bool(unseen) and self.given.only_warms_up(parameters, unseen)

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

    def declare_flat_parts(self, parts: Mapping[Tensor, Sequence[FlatPart]], group: dist.ProcessGroup) -> None:
        """Says which 1-D parameters consist of slices of other ones, cut anywhere, as ZeRO makes them.

        Args:
            parts: by parameter, what it holds; the same names in the same order on all ranks of `group`. Elements that
                belong to no part (padding) are left alone.

        Raises:
            ValueError: parts that do not lie one after the other within their parameter, or one that was updated before
                its parts were known.
        """
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        for parameter, members in parts.items():
            check_parts(parameter, members, rank, size)
            place, state = FlatPlace(tuple(members), group), self._state.get(parameter, {})
            if place != self._flat.get(parameter):  # state for other parts, or none, is of other shapes
                if any(tensor.any() for tensor in state.values()):
                    names = [part.name for part in members]
                    raise ValueError(f"flat parts {names}: declared after steps; allowed: before the first step")
                self._state.pop(parameter, None)
                self._unchecked = [(name, p) for name, p in self._unchecked if p is not parameter]
            self._flat[parameter] = place
            self._bound.pop(parameter, None)

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
        self.given.add(self.param_groups[-1], sum(len(group["params"]) for group in self.param_groups[:-1]))

    def _check_group(self, group: dict[str, Any]) -> None:
        for rate in ("lr", "dense_lr"):  # only here: schedulers may do with them what they like
            if rate in group:
                check_number(rate, group[rate])
        self.recipe(group)
        self.dense_options(group)
        check_path_options(group)
        if "capturable" in group:
            check_capturable(group, self.verify_every, self.agree_on_gradients)
