"""How DeepSpeed will cut a model's parameters, told before anything starts.

As its own defaults do: parameters in the order of their groups, without alignment, one sub-group per group. What a JSON
of one's own changes in that (`round_robin_gradients`, `sub_group_size`, ...) moves cuts, and with them a few rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from dist_lowrank.sharding.flat_slices import FlatSlice


def cut_group(
    parameters: Sequence[tuple[str, Tensor]], stage: int, world_size: int
) -> Iterator[tuple[str, Tensor, tuple[FlatSlice, ...]]]:
    """Each parameter of a group, with what each rank gets of it.

    Stages 1 and 2 cut the group as a whole, its length rounded up to twice the ranks; stage 3 cuts each parameter.
    """
    start, total = 0, sum(parameter.numel() for _, parameter in parameters)
    length = math.ceil(total / (2 * world_size)) * 2
    for name, parameter in parameters:
        elements = parameter.numel()
        if stage == 3:
            start, length = 0, math.ceil(elements / world_size)
        cuts = [min(max(rank * length - start, 0), elements) for rank in range(world_size + 1)]
        yield name, parameter, tuple(FlatSlice(tuple(parameter.shape), *cut) for cut in pairwise(cuts))
        start += elements


def cut_groups(
    groups: Sequence[Mapping[str, Any]], stage: int, world_size: int
) -> list[list[tuple[str, Tensor, tuple[FlatSlice, ...]]]]:
    """`cut_group` of groups as `param_groups` makes them, of named parameters."""
    return [list(cut_group(group["params"], stage, world_size)) for group in groups]
