"""The engine: one `step()` for every recipe and every layout.

    for each wave of matrices that fits the workspace:
        run the rules in lockstep      one all-reduce per round for the whole wave
        gather what replicas divided   coefficients, L x r, never R x C
        apply                          W <- (1 - lr wd) W - lr scale direction D[:, I]^T
    dense parameters: AdamW

An optimizer is a subclass that says which recipe a parameter group follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dist_lowrank.dictionaries import Dictionary, DictionaryCache
from dist_lowrank.optim.binding import BoundGroup, BoundMatrix, bind_group, check_replicas
from dist_lowrank.optim.dense import DenseOptions, dense_step
from dist_lowrank.optim.options import check_count
from dist_lowrank.optim.recipe import SCALES, Recipe, Update, low_rank_rule
from dist_lowrank.optim.rounding import RandomBits, RowNoise, store_weight
from dist_lowrank.optim.state_dict import load_into, validate_state_dict
from dist_lowrank.sharding.layouts import local
from dist_lowrank.sharding.rounds import Task, gather_rows, run_rounds

WORKSPACE_BYTES = 512 * 2**20


class LowRankOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here; subclasses define `recipe` and `dense_options`."""

    process_group: dist.ProcessGroup | None = None  # here too, for copies, which torch makes without __init__
    workspace_bytes: int = WORKSPACE_BYTES

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        process_group: dist.ProcessGroup | None = None,
        workspace_bytes: int = WORKSPACE_BYTES,
    ) -> None:
        check_count("workspace_bytes", workspace_bytes)
        self.process_group = process_group
        self.workspace_bytes = workspace_bytes
        self._forget_binding()
        super().__init__(params, {"low_rank": True, **defaults})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget_binding()
        self._state = state.pop("state", {})
        super().__setstate__(state)

    def _forget_binding(self) -> None:
        self._bound: list[BoundGroup] | None = None
        self._unchecked: list[tuple[str, Tensor]] = []  # replicated parameters not yet compared between ranks
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
            ValueError: replicas of plain parameters differ (checked at the first step).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = list(zip(self.param_groups, self.bind(), strict=True))
        self._check_replicas()
        for group in self.param_groups:
            if any(p.grad is not None and p.grad.is_sparse for p in group["params"]):
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        jobs: list[tuple[BoundMatrix, Recipe]] = []
        for group, bound in groups:
            recipe = self.recipe(group)
            jobs += [(matrix, recipe) for matrix in bound.matrices if matrix.parameter.grad is not None]
        for wave in self._waves(jobs):
            self._update(wave)
        for group, bound in groups:
            dense = [parameter for parameter in bound.dense if parameter.grad is not None]
            if dense:
                states, names = [self.state[p] for p in dense], [bound.dense_names[p] for p in dense]
                dense_step(dense, states, names, self.dense_options(group))
        return loss

    def _waves(self, jobs: list[tuple[BoundMatrix, Recipe]]) -> Iterator[list[tuple[BoundMatrix, Recipe]]]:
        """Cuts the work so that the transient memory of a wave fits the workspace, at least one matrix each.

        Decided from global shapes alone, so all ranks cut alike.
        """
        wave: list[tuple[BoundMatrix, Recipe]] = []
        used_bytes = 0
        for matrix, recipe in jobs:
            needed_bytes = matrix.transient_bytes()
            if wave and used_bytes + needed_bytes > self.workspace_bytes:
                yield wave
                wave, used_bytes = [], 0
            wave.append((matrix, recipe))
            used_bytes += needed_bytes
        if wave:
            yield wave

    def _update(self, wave: list[tuple[BoundMatrix, Recipe]]) -> None:
        tasks = []
        for matrix, recipe in wave:
            gradient = matrix.parameter.grad
            assert gradient is not None
            rows = matrix.layout.rows(local(gradient)).to(matrix.dtype)  # (l, n)
            state = {key: local(tensor) for key, tensor in self.state[matrix.parameter].items()}
            step = int(state["step"].add_(1))
            form, dictionary = matrix.layout.form, self._dictionary(matrix, recipe)
            noise = RowNoise(RandomBits(recipe.seed, matrix.name, step), matrix.layout.start)
            rule = low_rank_rule(rows, state, step, recipe, form, dictionary, noise)
            tasks.append(Task(rule, matrix.layout.group))
        updates = self._gather([matrix for matrix, _ in wave], run_rounds(tasks))
        for (matrix, recipe), update in zip(wave, updates, strict=True):
            if update.scores is not None:
                total = update.scores.sum()
                matrix.captured_energy = update.scores[update.indices].sum() / total.clamp(min=1e-38)
            self._apply(matrix, recipe, update)

    def _gather(self, matrices: list[BoundMatrix], updates: list[Update]) -> list[Update]:
        """Completes the directions of replicated matrices, whose rows the ranks divided among themselves."""
        buckets: dict[Any, list[int]] = {}
        for index, matrix in enumerate(matrices):
            if matrix.layout.replicated:
                key = (matrix.layout.group, matrix.dtype, updates[index].direction.device)
                buckets.setdefault(key, []).append(index)
        for (group, _, _), members in buckets.items():
            blocks = [(updates[index].direction, matrices[index].layout.form.rows) for index in members]
            for index, direction in zip(members, gather_rows(blocks, group), strict=True):
                updates[index] = Update(direction, updates[index].indices, updates[index].scores)
        return updates

    def _apply(self, matrix: BoundMatrix, recipe: Recipe, update: Update) -> None:
        weight = matrix.layout.form.view(local(matrix.parameter.detach()))  # (l, n), a view
        target = weight.to(matrix.dtype)  # the weight itself unless it is of lower precision
        self._dictionary(matrix, recipe).add_lifted(
            target,
            update.direction,
            update.indices,
            decay=1 - float(recipe.lr) * recipe.weight_decay,
            scale=-float(recipe.lr) * SCALES[recipe.scale](*matrix.layout.form.shape),
        )
        if target is not weight:
            random = RandomBits(recipe.seed, matrix.name, int(self._state[matrix.parameter]["step"]))
            store_weight(matrix.parameter, matrix.layout.form.view(target), recipe.weight_rounding, random)

    def _dictionary(self, matrix: BoundMatrix, recipe: Recipe) -> Dictionary:
        device = local(matrix.parameter).device
        return self._dictionaries.get(
            recipe.dictionary, matrix.layout.form.n, dtype=matrix.dtype, device=device, seed=recipe.seed
        )

    # Binding and state --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def bind(self) -> list[BoundGroup]:
        """Reads the layout of every parameter and creates all missing state, once; `step` and the rest call it.

        Communicates nothing.

        Raises:
            LayoutError: a matrix is sharded along its compressed axis, or over several mesh dimensions.
        """
        if self._bound is None:
            bound, position = [], 0
            for group in self.param_groups:
                bound.append(bind_group(group, position, self.recipe(group), self._state, self._replica_mesh))
                position += len(group["params"])
            self._bound = bound
            self._unchecked += [fresh for group in bound for fresh in group.fresh_replicas]
        return self._bound

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

    def _check_replicas(self) -> None:
        """Compares parameters that were bound since the last step; collective over their replicas."""
        unchecked, self._unchecked = self._unchecked, []
        if unchecked:
            replicas = self._replica_mesh(unchecked[0][1].device)
            if replicas is not None and replicas.size() > 1:
                check_replicas(unchecked, replicas.get_group())

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
            self.recipe(self.param_groups[-1])
            self.dense_options(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()  # a refused group leaves the optimizer as it was
            raise
        self._bound = None

    def state_dict(self) -> dict[str, Any]:
        """As torch's; tensors only. Sharded state is in DTensors (`full_state_dict` gathers them)."""
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its dtypes (torch casts integers too to the parameter's dtype).

        Takes DTensors sharded as this optimizer's, or full tensors, of which each rank takes its part. Nothing is
        changed if anything does not fit.

        Raises:
            ValueError: state that this optimizer cannot follow, naming the parameter.
        """
        kept, unchecked = self.state, self._unchecked
        saved: dict[int, dict[str, Any]] = {}

        def set_state_aside(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            validate_state_dict(self.param_groups, kept, incoming)
            saved.update(incoming["state"])
            return {**incoming, "state": {}}

        def put_state_back(_: Any) -> None:
            self._state, self._unchecked = kept, unchecked
            load_into([p for group in self.param_groups for p in group["params"]], kept, saved)

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
                for key, tensor in self.state[matrix.parameter].items():
                    cause = specs[key].cause if key in specs else "other_state"
                    totals[cause] += local(tensor).untyped_storage().nbytes()
            for parameter in bound.dense:
                for key, tensor in self.state[parameter].items():
                    cause = "other_state" if key == "step" else "dense_moments"
                    totals[cause] += local(tensor).untyped_storage().nbytes()
        return {**totals, "dictionary": self._dictionaries.storage_bytes}

    def captured_energy(self) -> dict[str, float]:
        """By parameter name: the share of the gradient's score that the columns chosen last hold.

        With `ranking="l2"` this is the share of `||A||_F^2`, at least r / n. Empty before the first step.
        """
        return {
            matrix.name: float(matrix.captured_energy)
            for bound in self._bound or []
            for matrix in bound.matrices
            if matrix.captured_energy is not None
        }
