"""Layout arithmetic over random shapes, cuts and world sizes, without processes: what is sent arrives and adds up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_lowrank.sharding.exchanged import ColumnBlock, Delivered, Exchanged, FlatColumns, FlatRows, flat_layout
from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.layouts import chunk_range, tall_form

exploring = settings(deadline=None)  # a busy machine may take long over a case
shapes = st.tuples(st.integers(1, 7), st.integers(1, 7))


@st.composite
def flat_matrices(draw: st.DrawFn) -> tuple[tuple[int, int], list[FlatSlice], str]:
    shape = draw(shapes)
    ranks = draw(st.integers(1, 6))
    cuts = sorted(draw(st.lists(st.integers(0, math.prod(shape)), min_size=ranks - 1, max_size=ranks - 1)))
    slices = [FlatSlice(shape, start, stop) for start, stop in pairwise([0, *cuts, math.prod(shape)])]
    return shape, slices, draw(st.sampled_from(["left", "right"]))


def fetch(layouts: Sequence[Exchanged], local: list[Tensor]) -> list[Tensor]:
    """What `transport.fetch_rows` does, all ranks in one process."""
    if not layouts[0].exchanges:
        return [layout.assemble(part, []) for layout, part in zip(layouts, local, strict=True)]
    sent = [layout.outgoing(part) for layout, part in zip(layouts, local, strict=True)]
    rows = []
    for rank, layout in enumerate(layouts):
        received = [sent[source][rank] for source in range(len(layouts))]
        assert [tuple(piece.shape) for piece in received] == layout.incoming_shapes()
        rows.append(layout.assemble(local[rank], received))
    return rows


def deliver(layouts: Sequence[Exchanged], weights: list[Tensor], updates: list[Tensor]) -> None:
    """Adds this multiple of the lifted rows: weight = 0.5 weight - 2 update."""
    for layout, weight, rows in zip(layouts, weights, updates, strict=True):
        if isinstance(layout, FlatRows):
            layout.add_rows(weight, rows, decay=0.5, scale=-2.0)
    delivered = [layout for layout in layouts if isinstance(layout, Delivered)]
    sent = [
        layout.outgoing_update(rows)
        for layout, rows in zip(layouts, updates, strict=True)
        if isinstance(layout, Delivered)
    ]
    for rank, layout in enumerate(delivered):
        received = [sent[source][rank] for source in range(len(layouts))]
        assert [tuple(piece.shape) for piece in received] == layout.incoming_update_shapes()
        layout.add_update(weights[rank], received, decay=0.5, scale=-2.0)


@exploring
@given(flat_matrices())
def test_flat_slices_come_together_as_rows_and_go_back(matrix: tuple[tuple[int, int], list[FlatSlice], str]) -> None:
    shape, slices, side = matrix
    form = tall_form(shape, side, 1)
    layouts = [flat_layout(form, slices, rank, None) for rank in range(len(slices))]
    full = torch.arange(1.0, math.prod(shape) + 1).view(shape)
    local = [full.flatten()[each.start : each.stop].clone() for each in slices]
    rows = fetch(layouts, local)
    tall = form.view(full)
    for layout, own in zip(layouts, rows, strict=True):
        assert torch.equal(own, tall[layout.start : layout.stop])
    # Every row is counted by exactly one rank.
    counted = torch.cat([torch.arange(each.start, each.stop)[each.owned] for each in layouts])
    assert counted.sort().values.tolist() == list(range(form.rows))
    # Gradients are only read.
    assert all(torch.equal(part, full.flatten()[s.start : s.stop]) for part, s in zip(local, slices, strict=True))

    weights = [part.clone() for part in local]
    deliver(layouts, weights, [own.square() for own in rows])
    expected = (0.5 * full - 2 * full.square()).flatten()
    assert torch.equal(torch.cat(weights), expected)


@exploring
@given(shapes, st.integers(2, 6), st.sampled_from(["left", "right"]))
def test_column_blocks_come_together_as_rows_and_go_back(shape: tuple[int, int], ranks: int, side: str) -> None:
    form = tall_form(shape, side, 1)
    layouts: list[ColumnBlock] = []
    for rank in range(ranks):
        start, stop = chunk_range(form.rows, ranks, rank)
        layouts.append(ColumnBlock(form=form, start=start, stop=stop, rank=rank, world_size=ranks))
    full = torch.arange(1.0, math.prod(shape) + 1).view(shape)
    axis = 1 - form.rows_axis
    local = [full.narrow(axis, (c := layout.columns).start, c.stop - c.start).clone() for layout in layouts]
    rows = fetch(layouts, local)
    for layout, own in zip(layouts, rows, strict=True):
        assert torch.equal(own, form.view(full)[layout.start : layout.stop])
    weights = [part.clone() for part in local]
    deliver(layouts, weights, [own.square() for own in rows])
    assert torch.equal(torch.cat(weights, dim=axis), 0.5 * full - 2 * full.square())


@exploring
@given(flat_matrices())
def test_rows_to_the_right_send_only_the_fragments_of_torn_rows(
    matrix: tuple[tuple[int, int], list[FlatSlice], str],
) -> None:
    shape, slices, _ = matrix
    form = tall_form(shape, "right", 1)
    for rank, own in enumerate(slices):
        layout = flat_layout(form, slices, rank, None)
        assert isinstance(layout, FlatRows)
        sent = sum(piece.numel() for piece in layout.outgoing(torch.zeros(own.stop - own.start)))
        assert sent <= 2 * shape[1] * (len(slices) - 1)
        if not own.torn_rows():
            assert sent == 0


def test_the_left_side_sends_a_matrix_over_the_ranks_each_way() -> None:
    shape, ranks = (8, 40), 4
    slices = [FlatSlice(shape, 80 * rank, 80 * (rank + 1)) for rank in range(ranks)]
    layout = flat_layout(tall_form(shape, "left", 1), slices, 0, None)
    assert isinstance(layout, FlatColumns)
    assert sum(piece.numel() for piece in layout.outgoing(torch.zeros(80))) == 8 * 40 // ranks
    assert sum(math.prod(shape) for shape in layout.incoming_update_shapes()) == 8 * 40 // ranks


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([(0, 5), (6, 12)], "rank 1 starts at 6; allowed: 5"),
        ([(0, 5), (4, 12)], "rank 1 starts at 4; allowed: 5"),
        ([(0, 5), (5, 11)], "end at 11; allowed: 12"),
    ],
)
def test_slices_with_gaps_or_overlaps_are_refused(pieces: list[tuple[int, int]], message: str) -> None:
    slices = [FlatSlice((3, 4), *piece) for piece in pieces]
    with pytest.raises(ValueError, match=message):
        flat_layout(tall_form((3, 4), "right", 1), slices, 0, None)


def test_a_slice_outside_its_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="0 to 13 is not allowed; allowed: within 0 to 12"):
        FlatSlice((3, 4), 0, 13)
