"""Moves what layouts say has to move: gradient rows to where they are worked on, updates to where weights are.

Each function takes the matrices of one wave in the same order on all ranks, and makes one collective per process
group, dtype and device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.sharding.layouts import Layout, RowBlock
from dist_lowrank.sharding.rounds import exchange, gather_rows


def fetch_rows(layouts: Sequence[Layout], gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """This rank's rows of each matrix, (stop - start, n), in the dtype of the arithmetic; views where possible."""
    rows = [
        layout.rows(gradient).to(dtype) if isinstance(layout, RowBlock) else gradient.to(dtype)
        for layout, gradient, dtype in zip(layouts, gradients, dtypes, strict=True)
    ]
    for group, members in _channels(layouts, rows, [layout.exchanges for layout in layouts]):
        incoming = exchange(
            [layouts[index].outgoing(rows[index]) for index in members],
            [layouts[index].incoming_shapes() for index in members],
            group,
        )
        for index, arrived in zip(members, incoming, strict=True):
            rows[index] = layouts[index].assemble(rows[index], arrived)
    for index, layout in enumerate(layouts):
        if not isinstance(layout, RowBlock) and not layout.exchanges:
            rows[index] = layout.assemble(rows[index], [])
    return rows


def gather_coefficients(
    layouts: Sequence[Layout], directions: Sequence[Tensor], deliveries: Sequence[str]
) -> list[Tensor]:
    """Completes directions, (stop - start, r) to (L, r), where coefficients are delivered."""
    complete = list(directions)
    for group, members in _channels(layouts, directions, [delivery == "coefficients" for delivery in deliveries]):
        blocks = [(directions[index], layouts[index].form.rows) for index in members]
        for index, gathered in zip(members, gather_rows(blocks, group), strict=True):
            complete[index] = gathered
    return complete


def exchange_updates(
    layouts: Sequence[Layout], lifted: Sequence[Tensor], deliveries: Sequence[str]
) -> list[list[Tensor]]:
    """What came from each rank for this rank's part of the weights, where rows are delivered."""
    arrived: list[list[Tensor]] = [[] for _ in layouts]
    for group, members in _channels(layouts, lifted, [delivery == "rows" for delivery in deliveries]):
        incoming = exchange(
            [layouts[index].outgoing_update(lifted[index]) for index in members],
            [layouts[index].incoming_update_shapes() for index in members],
            group,
        )
        for index, pieces in zip(members, incoming, strict=True):
            arrived[index] = pieces
    return arrived


def _channels(
    layouts: Sequence[Layout], tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> list[tuple[Any, list[int]]]:
    """The wanted matrices that can share a collective: process group, and positions."""
    channels: dict[tuple[Any, torch.dtype, torch.device], list[int]] = {}
    for index, (layout, tensor) in enumerate(zip(layouts, tensors, strict=True)):
        if wanted[index]:
            channels.setdefault((layout.group, tensor.dtype, tensor.device), []).append(index)
    return [(group, members) for (group, _, _), members in channels.items()]
