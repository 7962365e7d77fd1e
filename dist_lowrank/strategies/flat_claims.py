"""What a flat tensor holds of which parameters, and the checks that it is so.

A wrapper such as DeepSpeed's lays the weights of many parameters one after the other in a buffer, in an order and with
gaps of its own, cuts it in parts, one per rank, anywhere, and gives the optimizer an fp32 copy of this rank's part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.layouts import LayoutError
from dist_lowrank.sharding.pieces import FlatPart


@dataclass(frozen=True, slots=True)
class Run:
    """This rank's part of a parameter: where it lies, and how to see the model's own weights."""

    part: FlatPart
    own: FlatSlice
    weight: Callable[[], Any]  # a context that gives the whole weight; collective under stage 3


@dataclass(frozen=True, slots=True)
class FlatTensor:
    """One of the optimizer's tensors."""

    tensor: Tensor  # 1-D
    group: dist.ProcessGroup
    runs: tuple[Run, ...]
    padding: tuple[tuple[int, int], ...]  # start and stop of elements that belong to no parameter


def read_buffer(
    parameters: Sequence[tuple[str, Tensor]],
    buffer: Tensor,
    master: Tensor,
    group: dist.ProcessGroup,
    *,
    largest_gap: int,
    largest_end: int,
) -> FlatTensor:
    """Parameters that are views of a buffer, which is cut in equal parts.

    Args:
        parameters: in the order in which their gradients are reduced.
        buffer: (elements,), the same on all ranks.
        master: a copy of this rank's part, in another precision.
        largest_gap, largest_end: elements of padding that there can be between parameters, and behind the last.

    Raises:
        LayoutError: a parameter that lies elsewhere, or elements that belong to none and are no padding.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    length = buffer.numel() // world_size
    if master.numel() != length or buffer.numel() % world_size:
        raise LayoutError(
            f"a part of {master.numel()} elements of a buffer of {buffer.numel()} over {world_size} ranks"
        )
    runs, edges = [], [0]
    for name, parameter in parameters:
        shape, elements = tuple(parameter.shape), parameter.numel()
        offset_bytes = parameter.data_ptr() - buffer.data_ptr()
        begin, rest = divmod(offset_bytes, buffer.element_size()) if elements else (edges[-1], 0)
        if rest or begin < edges[-1] or begin + elements > buffer.numel() or not parameter.is_contiguous():
            raise LayoutError(
                f"the weight of parameter {name!r} does not lie in the buffer of its group, behind those before it"
            )
        cuts = [min(max(k * length - begin, 0), elements) for k in range(world_size + 1)]
        slices = tuple(FlatSlice(shape, cuts[k], cuts[k + 1]) for k in range(world_size))
        part = FlatPart(name, min(max(begin - rank * length, 0), length), slices)
        runs.append(Run(part, slices[rank], partial(nullcontext, parameter.detach())))
        edges += [begin, begin + elements]
    edges.append(buffer.numel())
    gaps = list(zip(edges[::2], edges[1::2], strict=True))
    allowed = [largest_gap] * (len(gaps) - 1) + [largest_end]
    for (start, stop), limit in zip(gaps, allowed, strict=True):
        if stop - start > limit or (stop > start and bool(buffer[start:stop].any())):
            raise LayoutError(f"elements {start} to {stop} of a buffer belong to no parameter, and are no padding")
    padding = ((max(start - rank * length, 0), min(stop - rank * length, length)) for start, stop in gaps)
    return FlatTensor(master, group, tuple(runs), tuple((a, b) for a, b in padding if a < b))


def check_claims(flat: FlatTensor) -> str | None:
    """A problem unless each element belongs to one parameter or is padding."""
    claims = [(run.part.offset, run.part.offset + run.own.stop - run.own.start, run.part.name) for run in flat.runs]
    claims += [(start, stop, "padding") for start, stop in flat.padding]
    position = 0
    for start, stop, name in sorted((claim for claim in claims if claim[0] < claim[1]), key=lambda claim: claim[:2]):
        if start != position:
            return f"elements {position} to {start} of a flat tensor are claimed twice or not at all, near {name!r}"
        position = stop
    if position != flat.tensor.numel():
        return f"{position} of {flat.tensor.numel()} elements of a flat tensor are claimed"
    return None


def check_weights(flat: FlatTensor) -> str | None:
    """A problem if what is said to be a parameter's part is not equal to the model's weight. Collective in stage 3."""
    problem = None
    for run in flat.runs:
        own, offset = run.own, run.part.offset
        with run.weight() as weight:
            expected = weight.reshape(-1)[own.start : own.stop]
            held = flat.tensor.detach()[offset : offset + own.stop - own.start]
            if not torch.equal(held.to(expected.device, expected.dtype), expected):
                problem = problem or (
                    f"elements {offset} to {offset + own.stop - own.start} of a flat tensor are not elements "
                    f"{own.start} to {own.stop} of parameter {run.part.name!r}"
                )
    return problem
