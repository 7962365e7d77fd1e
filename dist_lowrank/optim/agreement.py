"""What the ranks that share parameters have to agree on before a step: which parameters have a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lowrank.optim.binding import BoundParameter


def agree_on_gradients(parameters: Sequence[BoundParameter], ask_others: bool) -> set[Tensor]:
    """The parameters to be updated: those of which any rank that shares them has a gradient.

    Args:
        ask_others: False takes this rank's word for it. Else collective: one byte per parameter and group.

    Raises:
        RuntimeError: on every rank, naming a parameter of which only some replicas have a gradient: they would part.
    """
    active = {bound.parameter for bound in parameters if bound.parameter.grad is not None}
    if not ask_others:
        return active
    for group, members in _by_group(parameters, replicated=False):
        flags = _maximum([bound.parameter in active for bound in members], members, group)
        active |= {bound.parameter for bound, flag in zip(members, flags, strict=True) if flag}
    present, absent = set(active), {bound.parameter for bound in parameters} - active
    # What a group has found goes on to the next, and nobody stops in between: with replicas over two mesh dimensions,
    # ranks that saw nothing amiss would wait for those that did.
    for group, members in _by_group(parameters, replicated=True):
        own = [bound.parameter in present for bound in members] + [bound.parameter in absent for bound in members]
        somewhere = _maximum(own, members, group)
        present |= {bound.parameter for bound, flag in zip(members, somewhere, strict=False) if flag}
        absent |= {bound.parameter for bound, flag in zip(members, somewhere[len(members) :], strict=True) if flag}
    for bound in parameters:
        if bound.parameter in present and bound.parameter in absent:
            raise RuntimeError(
                f"parameter {bound.name!r} has a gradient on some of the ranks that hold replicas of it, and none "
                "on others; allowed: on all or on none (DDP sees to it with find_unused_parameters=True)"
            )
    return active


def check_not_in_backward(parameters: Iterable[BoundParameter]) -> None:
    """Refuses a step from a gradient hook where ranks share parameters.

    Raises:
        RuntimeError: if so.
    """
    if torch._C._current_graph_task_id() != -1 and any(bound.sharers for bound in parameters):
        raise RuntimeError(
            "step() was called during backward, from a gradient hook (a layer-wise optimizer): ranks need not come "
            "there in the same order, and gradients need not be summed over ranks yet; allowed: step() after "
            "backward. To save the memory of gradients, shard them with FSDP2"
        )


def _by_group(
    parameters: Sequence[BoundParameter], replicated: bool
) -> list[tuple[dist.ProcessGroup, list[BoundParameter]]]:
    members: dict[Any, list[BoundParameter]] = {}
    for bound in parameters:
        for group, holds_replicas in bound.sharers:
            if holds_replicas == replicated:
                members.setdefault(group, []).append(bound)
    return list(members.items())


def _maximum(flags: Sequence[bool], members: Sequence[BoundParameter], group: dist.ProcessGroup) -> list[int]:
    votes = torch.tensor(flags, dtype=torch.uint8, device=members[0].parameter.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
    return votes.tolist()  # type: ignore[no-any-return]
