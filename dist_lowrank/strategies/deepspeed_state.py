"""Weights and optimizer state of a DeepSpeed engine as shards of the model's own tensors, to save and to load.

What is saved under ZeRO are the master weights. Flat parts are cut anywhere; to be blocks, the rows that a cut has torn
go whole to the rank that holds their first element, and nothing is gathered. To load, each rank reads the rows that it
has any part of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lowrank.checkpoint.shards import Shard, shard_of
from dist_lowrank.checkpoint.state import NativeState, let_state_sleep, model_tensors, state_of, wake_state
from dist_lowrank.optim.binding import canonical_name
from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.given import GivenParameters
from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.layouts import LayoutError
from dist_lowrank.sharding.rounds import exchange
from dist_lowrank.sharding.turns import finish
from dist_lowrank.strategies.deepspeed import flat_tensors
from dist_lowrank.strategies.flat_claims import FlatTensor

Run = tuple[str, Tensor, tuple[FlatSlice, ...]]  # the name of a tensor, this rank's elements of it, who holds which


def engine_state(engine: Any, optimizer: torch.optim.Optimizer, given: GivenParameters) -> NativeState | ZeroState:
    """How to save and load an engine.

    Args:
        optimizer: as `deepspeed.initialize` was given it, bound if it is one of `dist_lowrank.optim`.
        given: the optimizer's parameters before `deepspeed.initialize`.
    """
    wrapper = engine.optimizer
    if wrapper is optimizer:  # stage 0 in fp32
        return NativeState(engine.module, optimizer)
    if type(wrapper).__name__ == "FP16_UnfusedOptimizer":
        return _CopiesState(engine.module, optimizer, wrapper, given)
    return ZeroState(engine, optimizer, given)


class _CopiesState(NativeState):
    """Stage 0 in 16 bits: the optimizer has a copy in fp32 of each parameter."""

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, wrapper: Any, given: GivenParameters
    ) -> None:
        super().__init__(model, optimizer)
        groups = zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
        self.copies = [pair for masters, weights in groups for pair in zip(masters, weights, strict=True)]
        self.masters = {f"model.{_name(given, weight)}": master for master, weight in self.copies}

    def to_save(self) -> dict[str, Shard]:
        return super().to_save() | {name: shard_of(master) for name, master in self.masters.items()}

    def to_load(self, *, weights_only: bool) -> dict[str, Shard]:
        shards = super().to_load(weights_only=weights_only)
        return shards | {name: shard_of(master) for name, master in self.masters.items()}

    def loaded(self) -> None:
        super().loaded()
        with torch.no_grad():
            for master, weight in self.copies:
                weight.copy_(master)


class ZeroState:
    """Stages 1 to 3."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, given: GivenParameters) -> None:
        self.engine, self.optimizer = engine, optimizer
        source = SimpleNamespace(given=given, param_groups=optimizer.param_groups)
        self.flat = flat_tensors(engine, optimizer if isinstance(optimizer, LowRankOptimizer) else source)
        self._put_back: list[Callable[[], Any]] = []

    def to_save(self) -> dict[str, Shard]:
        shards = self._rest() | {name: shard for name, shard, _ in self._blocks()}
        for flat in self.flat:
            for runs in (self._weights(flat), *self._moments(flat)):
                shards |= _whole_rows(runs, flat.group)
        return shards

    def to_load(self, *, weights_only: bool) -> dict[str, Shard]:
        shards = self._rest()
        if not weights_only:
            wake_state(self.optimizer)
            shards |= {name: block for name, _, block in self._blocks()}
        self._put_back = []
        for flat in self.flat:
            for runs in (self._weights(flat), *(() if weights_only else self._moments(flat))):
                for name, values, slices in runs:
                    own = slices[dist.get_rank(flat.group)]
                    first, last = _rows(own, touched=True)
                    rows = values.new_empty((last - first) * _width(own))
                    skipped = own.start - first * _width(own)
                    shards[name] = _block(rows, own.shape, first)
                    self._put_back.append(_copying(values, rows[skipped : skipped + values.numel()]))
        return shards

    @torch.no_grad()
    def loaded(self) -> None:
        for put_back in self._put_back:
            put_back()
        self._put_back = []
        let_state_sleep(self.optimizer)
        if self.flat and not _is_stage_3(self.engine):
            wrapper = self.engine.optimizer
            buffers = getattr(wrapper, "bit16_groups_flat", None) or wrapper.bf16_groups_flat
            for flat, buffer in zip(self.flat, buffers, strict=True):
                _spread(flat, buffer)
        elif self.flat:
            self._fill_parts()

    def _fill_parts(self) -> None:
        """Stage 3: weights that are gathered at the moment are let go, and their parts filled."""
        for weight in self.engine.module.parameters():
            if hasattr(weight, "ds_id") and weight.ds_status.name == "AVAILABLE":
                weight.partition()
        for flat, buffer in zip(self.flat, self.engine.optimizer.fp16_partitioned_groups_flat, strict=True):
            buffer.copy_(flat.tensor)

    def _rest(self) -> dict[str, Shard]:
        """Buffers, and parameters that are not trained: the same on all ranks."""
        trained = {f"model.{run.part.name}" for flat in self.flat for run in flat.runs}
        rest = {name: value for name, value in model_tensors(self.engine.module).items() if name not in trained}
        for name, value in rest.items():
            if hasattr(value, "ds_id"):
                raise LayoutError(f"DeepSpeed: {name} is not trained, but cut by stage 3; allowed: stages 0 to 2")
        return {name: shard_of(value) for name, value in rest.items()}

    def _weights(self, flat: FlatTensor) -> list[Run]:
        return [(f"model.{run.part.name}", _values(flat.tensor, run), run.part.slices) for run in flat.runs]

    def _moments(self, flat: FlatTensor) -> Iterator[list[Run]]:
        """State that has an element for each of the parameter's."""
        state = state_of(self.optimizer, flat.tensor)
        for key in ("exp_avg", "exp_avg_sq"):
            if isinstance(self.optimizer, LowRankOptimizer):
                bound, _ = self.optimizer.flat_members()[flat.tensor]
                pieces = [dense.piece for dense in bound.dense]
                yield [(f"optimizer.{p.prefix}{key}", state[p.prefix + key].view(-1), p.flat) for p in pieces]
            else:
                yield [
                    (f"optimizer.{run.part.name}.{key}", _values(state[key], run), run.part.slices) for run in flat.runs
                ]

    def _blocks(self) -> Iterator[tuple[str, Shard, Shard]]:
        """State that has rows of its own, or is the same on all ranks: as it is saved, and as it is loaded."""
        for flat in self.flat:
            state = state_of(self.optimizer, flat.tensor)
            if not isinstance(self.optimizer, LowRankOptimizer):
                for run in flat.runs:
                    step = shard_of(state["step"])
                    yield f"optimizer.{run.part.name}.step", step, step
                continue
            bound, _ = self.optimizer.flat_members()[flat.tensor]
            for matrix in bound.matrices:
                prefix, layout = matrix.piece.prefix, matrix.layout
                for key in ("step", *matrix.specs):
                    name, tensor = f"optimizer.{prefix}{key}", state[prefix + key]
                    if key == "step" or not matrix.specs[key].sharded:
                        yield name, shard_of(tensor), shard_of(tensor)
                        continue
                    shape, first = (layout.form.rows, tensor.shape[1]), range(layout.start, layout.stop)[layout.owned]
                    owned = Shard(tensor[layout.owned], shape, (first.start, 0))
                    yield name, owned, Shard(tensor, shape, (layout.start, 0))
                role = matrix.role  # whose dictionary may be kept with this matrix
                if role is not None and role.is_kept_with(flat.tensor, prefix):
                    for key in (role.key, role.step_key):
                        yield f"optimizer.{key}", shard_of(state[key]), shard_of(state[key])
            for dense in bound.dense:
                step = shard_of(state[f"{dense.piece.prefix}step"])
                yield f"optimizer.{dense.piece.prefix}step", step, step


def _name(given: GivenParameters, parameter: Tensor) -> str:
    name = given.name(parameter)
    assert name is not None
    return canonical_name(name)


def _is_stage_3(engine: Any) -> bool:
    return type(engine.optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3"


def _values(tensor: Tensor, run: Any) -> Tensor:
    return tensor.detach()[run.part.offset : run.part.offset + run.own.stop - run.own.start]


def _width(part: FlatSlice) -> int:
    return max(1, math.prod(part.shape[1:]))


def _rows(part: FlatSlice, *, touched: bool) -> tuple[int, int]:
    """The rows along dimension 0 that a part touches, or those whose first element it holds."""
    width = _width(part)
    if part.start == part.stop:
        return (-(-part.start // width),) * 2
    return (part.start // width if touched else -(-part.start // width)), -(-part.stop // width)


def _block(rows: Tensor, shape: tuple[int, ...], first: int) -> Shard:
    """Whole rows of a tensor; of a scalar, all or nothing."""
    if not shape:
        return Shard(rows.view(()), shape, ()) if rows.numel() else Shard(rows, (1,), (0,))
    return Shard(rows.view(-1, *shape[1:]), shape, (first, *(0 for _ in shape[1:])))


def _whole_rows(runs: list[Run], group: dist.ProcessGroup) -> dict[str, Shard]:
    """Runs of elements, cut anywhere, as blocks of whole rows. Collective."""
    if not runs:
        return {}
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    outgoing, shapes = [], []
    for _, values, slices in runs:
        own = slices[rank]
        wanted = [tuple(row * _width(each) for row in _rows(each, touched=False)) for each in slices]
        overlaps = [_overlap((own.start, own.stop), target) for target in wanted]
        outgoing.append([values[start - own.start : stop - own.start] for start, stop in overlaps])
        arriving = [_overlap((each.start, each.stop), wanted[rank]) for each in slices]
        shapes.append([(stop - start,) for start, stop in arriving])
    assert all(len(pieces) == ranks for pieces in outgoing)
    arrived = finish(exchange(outgoing, shapes, group))
    return {
        name: _block(torch.cat(pieces), slices[rank].shape, _rows(slices[rank], touched=False)[0])
        for (name, _, slices), pieces in zip(runs, arrived, strict=True)
    }


def _overlap(a: tuple[int, int], b: tuple[int, ...]) -> tuple[int, int]:
    start = max(a[0], b[0])
    return start, max(start, min(a[1], b[1]))


def _spread(flat: FlatTensor, buffer: Tensor) -> None:
    """Stages 1 and 2: the model's weights from the master weights of all ranks. Collective."""
    parts = list(buffer.chunk(dist.get_world_size(flat.group)))
    own = flat.tensor.detach().to(buffer.device, buffer.dtype)
    dist.all_gather([part.view(torch.uint8) for part in parts], own.view(torch.uint8), group=flat.group)


def _copying(values: Tensor, source: Tensor) -> Callable[[], Any]:
    return lambda: values.copy_(source)
