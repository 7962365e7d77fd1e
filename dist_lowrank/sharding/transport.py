"""Moves what layouts say has to move: gradient rows to where they are worked on, updates to where weights are.

Each function takes the matrices of one wave in the same order on all ranks, and makes one collective per process
group, dtype and device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_lowrank.sharding.exchanged import Delivered, Exchanged
from dist_lowrank.sharding.layouts import Layout, RowBlock
from dist_lowrank.sharding.rounds import exchange, gather_rows
from dist_lowrank.sharding.turns import Turns


def fetch_rows(
    layouts: Sequence[Layout], gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> Turns[list[Tensor]]:
    """This rank's rows of each matrix, (stop - start, n), in these dtypes; views where possible."""
    rows = [
        layout.rows(gradient) if isinstance(layout, RowBlock) else gradient.to(sent_dtype(gradient.dtype, dtype))
        for layout, gradient, dtype in zip(layouts, gradients, dtypes, strict=True)
    ]
    exchanged = {index: layout for index, layout in enumerate(layouts) if isinstance(layout, Exchanged)}
    exchanging = {index: layout for index, layout in exchanged.items() if layout.exchanges}
    for group, members in _channels(exchanging, rows) if exchanging else ():
        incoming = yield from exchange(
            [exchanged[index].outgoing(rows[index]) for index in members],
            [exchanged[index].incoming_shapes() for index in members],
            group,
        )
        for index, arrived in zip(members, incoming, strict=True):
            rows[index] = exchanged[index].assemble(rows[index], arrived)
    for index, layout in exchanged.items():
        if not layout.exchanges:
            rows[index] = layout.assemble(rows[index], [])
    for index, dtype in enumerate(dtypes):  # one at a time, so that what was converted is let go
        rows[index] = rows[index].to(dtype)
    return rows


def sent_dtype(stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """In which numbers stored so are sent that are wanted so: the narrower, as nothing is lost on the way."""
    return stored if stored.itemsize < wanted.itemsize else wanted


def gather_coefficients(
    layouts: Sequence[Layout], directions: Sequence[Tensor], deliveries: Sequence[str]
) -> Turns[list[Tensor]]:
    """Completes directions, (stop - start, r) to (L, r), where coefficients are delivered."""
    complete = list(directions)
    gathered = {k: layout for k, layout in enumerate(layouts) if deliveries[k] == "coefficients"}
    for group, members in _channels(gathered, directions):
        blocks = [(directions[index], gathered[index].form.rows) for index in members]
        wholes = yield from gather_rows(blocks, group)
        for index, whole in zip(members, wholes, strict=True):
            complete[index] = whole
    return complete


def exchange_updates(
    layouts: Sequence[Layout], lifted: Sequence[Tensor], deliveries: Sequence[str]
) -> Turns[dict[int, list[Tensor]]]:
    """What came from each rank for this rank's part of the weights, where rows are delivered; by matrix."""
    delivered = {
        index: layout
        for index, layout in enumerate(layouts)
        if isinstance(layout, Delivered) and deliveries[index] == "rows"
    }
    arrived: dict[int, list[Tensor]] = {}
    for group, members in _channels(delivered, lifted):
        incoming = yield from exchange(
            [delivered[index].outgoing_update(lifted[index]) for index in members],
            [delivered[index].incoming_update_shapes() for index in members],
            group,
        )
        arrived.update(zip(members, incoming, strict=True))
    return arrived


def _channels(layouts: Mapping[int, Layout], tensors: Sequence[Tensor]) -> list[tuple[Any, list[int]]]:
    """Those of the matrices at these positions that can share a collective: process group, and positions."""
    channels: dict[tuple[Any, torch.dtype, torch.device], list[int]] = {}
    for index, layout in layouts.items():
        tensor = tensors[index]
        channels.setdefault((layout.group, tensor.dtype, tensor.device), []).append(index)
    return [(group, members) for (group, _, _), members in channels.items()]
