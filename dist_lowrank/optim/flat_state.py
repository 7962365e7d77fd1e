"""The state of flat tensors, whose pieces are cut anywhere: gathered to global shapes, and cut again."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lowrank.optim.binding import BoundMatrix, BoundParameter
from dist_lowrank.optim.dense import DenseParameter
from dist_lowrank.sharding.exchanged import flat_layout
from dist_lowrank.sharding.layouts import Layout
from dist_lowrank.sharding.pieces import FlatPlace


def gather_flat_state(bound: BoundParameter, place: FlatPlace, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a flat tensor's pieces in global shapes, the same on all ranks. Collective."""
    full = {key: value.clone() for key, value in state.items()}
    for matrix in bound.matrices:
        owned, counts = matrix.layout.owned, _rows_by_rank(matrix)
        for key in _sharded_keys(matrix, state):
            full[key] = torch.cat(_gather(state[key][owned], counts, place.group))
    for dense in bound.dense:
        counts = [each.stop - each.start for each in dense.piece.flat]
        for key in _moments(dense):
            full[key] = torch.cat(_gather(state[key], counts, place.group)).view(dense.piece.shape)
    return full


def cut_flat_state(bound: BoundParameter, place: FlatPlace, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of state in global shapes. What has another shape stays as it is."""
    own = dict(saved)
    for matrix in bound.matrices:
        layout = matrix.layout
        for key in _sharded_keys(matrix, saved):
            if saved[key].shape[0] == layout.form.rows:
                own[key] = saved[key][layout.start : layout.stop]
    for dense in bound.dense:
        run = dense.piece.flat[place.group.rank()]
        for key in _moments(dense):
            if isinstance(saved.get(key), Tensor) and tuple(saved[key].shape) == dense.piece.shape:
                own[key] = saved[key].reshape(-1)[run.start : run.stop]
    return own


def cut_tensors(bound: BoundParameter, state: Mapping[str, Tensor]) -> list[Tensor]:
    """The state of a flat tensor's pieces of which each rank has another part."""
    keys = [key for matrix in bound.matrices if not _in_common(matrix) for key in _sharded_keys(matrix, state)]
    return [state[key] for key in keys + [key for dense in bound.dense for key in _moments(dense)]]


def _sharded_keys(matrix: BoundMatrix, state: Mapping[str, Tensor]) -> list[str]:
    keys = [matrix.piece.prefix + key for key, spec in matrix.specs.items() if spec.sharded]
    return [key for key in keys if isinstance(state.get(key), Tensor)]


def _moments(dense: DenseParameter) -> list[str]:
    return [dense.piece.prefix + key for key in ("exp_avg", "exp_avg_sq")]


def _rows_by_rank(matrix: BoundMatrix) -> list[int]:
    return [len(range(each.start, each.stop)[each.owned]) for each in _layouts(matrix)]


def _in_common(matrix: BoundMatrix) -> bool:
    """Whether several ranks have the same rows, because a row is torn between them."""
    ranges = [(each.start, each.stop) for each in _layouts(matrix) if each.stop > each.start]
    return len(set(ranges)) < len(ranges)


def _layouts(matrix: BoundMatrix) -> list[Layout]:
    """By rank."""
    slices = matrix.piece.flat
    return [flat_layout(matrix.layout.form, slices, rank, None) for rank in range(len(slices))]


def _gather(block: Tensor, counts: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Blocks of `counts` rows from all ranks."""
    largest = max(counts)
    sent = block.new_zeros(largest, *block.shape[1:])
    sent[: len(block)] = block
    width = math.prod(block.shape[1:]) * block.element_size()
    as_bytes = sent.view(torch.uint8).view(largest * width)  # gloo does not take all dtypes
    received = [torch.empty_like(as_bytes) for _ in counts]
    dist.all_gather(received, as_bytes, group=group)
    return [
        each.view(block.dtype).view(largest, *block.shape[1:])[:count]
        for each, count in zip(received, counts, strict=True)
    ]
