"""What the optimizer of a run will send, told before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from dist_lowrank.config.optimizers import AdamWConfig, DCTAdamWConfig, ProjectedConfig
from dist_lowrank.config.schema import RunConfig
from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.traffic import PURPOSES, Collective, collectives_of_dictionaries, collectives_of_step
from dist_lowrank.sharding.pieces import FlatPart
from dist_lowrank.strategies import apply_strategy
from dist_lowrank.training.model import blocks, build_model, low_rank_forms, route
from dist_lowrank.training.optimizers import make_optimizer
from dist_lowrank.training.zero_layout import cut_groups


@dataclass(frozen=True, slots=True)
class TrafficRow:
    """The collectives of one kind of step for one purpose, as rank 0 makes them."""

    # "every step", or "refresh" (the busiest, if staggered) and "between refreshes"; "first step" where that differs.
    # "... , at most": what such a step sends in place of that if all gradients have a lower rank than their subspaces.
    # "every N steps": beside what these steps send anyway.
    step: str
    purpose: str  # one of PURPOSES; "nothing" if there are none
    operation: str
    collectives: int
    bytes: int  # that rank 0 hands over


def forecast_traffic(config: RunConfig, world_size: int) -> list[TrafficRow]:
    """By kind of step and purpose, from the layouts of a model without storage; nothing is sent.

    The model is sharded as a run's, in a process group that pretends to have `world_size` ranks and is gone afterwards.
    What DDP, FSDP2 and DeepSpeed send for gradients and weights is not counted. AdamW sends nothing.
    """
    if isinstance(config.optimizer, AdamWConfig):
        return _by_purpose("every step", [])
    with pretended_rank(0, world_size):
        return traffic_of(config, optimizer_on_layouts(config, build_model(config, meta=True)))


def traffic_of(config: RunConfig, optimizer: LowRankOptimizer) -> list[TrafficRow]:
    """By kind of step and purpose, of an optimizer on the layouts of a run."""
    of_step = partial(collectives_of_step, optimizer, scores_known=config.strategy.low_rank_gradients)
    of_first_step = partial(collectives_of_step, optimizer, step=1)  # scores are not known yet
    at_refresh, at_refresh_at_most = of_step(refresh=True), of_step(refresh=True, at_most=True)
    otherwise = of_step(refresh=False)
    changing = collectives_of_dictionaries(optimizer)
    verifying = []
    if optimizer.verify_every:
        verifying = of_step(refresh=True, verification=True)[len(at_refresh) :]
    if isinstance(config.optimizer, DCTAdamWConfig | ProjectedConfig) and config.optimizer.refresh_stagger:
        one_interval = range(2, config.optimizer.refresh_interval + 2)  # after the first step, at which all choose
        at_refresh, at_refresh_at_most = (
            max((of_step(step=step, at_most=at_most) for step in one_interval), key=_bytes) for at_most in (False, True)
        )
    refresh = "every step" if at_refresh == otherwise else "refresh"
    rows = _by_purpose(refresh, at_refresh) + _beyond(refresh, at_refresh, at_refresh_at_most)
    if at_refresh != otherwise:
        rows += _by_purpose("between refreshes", otherwise)
    first = of_first_step()
    if first != at_refresh:
        rows += _by_purpose("first step", first) + _beyond("first step", first, of_first_step(at_most=True))
    if changing:
        rows += _by_purpose(f"every {optimizer.param_groups[0]['dictionary_interval']} steps", changing)
    return rows + (_by_purpose(f"every {optimizer.verify_every} steps", verifying) if verifying else [])


def optimizer_on_layouts(config: RunConfig, model: nn.Module) -> LowRankOptimizer:
    """The optimizer of a model without storage, which is sharded as this rank would hold it."""
    if config.strategy.zero_stage:
        return optimizer_on_flat_tensors(config, model, "meta")
    if config.strategy.name not in ("ddp", "zero0"):  # under which the optimizer sees the plain parameters
        forms = low_rank_forms(route(model, config), config)
        apply_strategy(model, blocks(model), config.strategy, config.precision, forms, torch.device("cpu"))
    optimizer = make_optimizer(config, route(model, config))
    assert isinstance(optimizer, LowRankOptimizer)
    return optimizer


def optimizer_on_flat_tensors(config: RunConfig, model: nn.Module, device: str) -> LowRankOptimizer:
    """As DeepSpeed's stages 1 to 3 make them."""
    stage, rank, group_of_all = config.strategy.zero_stage, dist.get_rank(), dist.group.WORLD
    assert stage is not None
    assert group_of_all is not None
    cuts = cut_groups(route(model, config), stage, dist.get_world_size())
    optimizer = make_optimizer(config, route(model, config))
    assert isinstance(optimizer, LowRankOptimizer)
    for group, members in zip(optimizer.param_groups, cuts, strict=True):
        parts, position = [], 0
        for name, _, slices in members:
            parts.append(FlatPart(name, position, slices))
            position += slices[rank].stop - slices[rank].start
        flat = nn.Parameter(torch.empty(position, device=device))
        group["params"] = [flat]
        optimizer.declare_flat_parts({flat: parts}, group_of_all)
    return optimizer


@contextmanager
def pretended_rank(rank: int, world_size: int) -> Iterator[None]:
    """This process as one rank of many; torch's `fake` backend sends nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # DTensor remembers meshes of the groups that are gone, and would take later meshes for them.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]


def _beyond(step: str, usual: list[Collective], at_most: list[Collective]) -> list[TrafficRow]:
    """What may be more than usual."""
    if usual == at_most:
        return []
    known = {(row.purpose, row.bytes) for row in _by_purpose(step, usual)}
    return [row for row in _by_purpose(f"{step}, at most", at_most) if (row.purpose, row.bytes) not in known]


def _bytes(sent: Sequence[Collective]) -> int:
    return sum(each.bytes for each in sent)


def _by_purpose(step: str, collectives: list[Collective]) -> list[TrafficRow]:
    rows = []
    for purpose in PURPOSES:
        calls = [each for each in collectives if each.purpose == purpose]
        if calls:
            rows.append(TrafficRow(step, purpose, calls[0].operation, len(calls), sum(each.bytes for each in calls)))
    return rows or [TrafficRow(step, "nothing", "", 0, 0)]
