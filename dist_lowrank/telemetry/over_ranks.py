"""Figures of all ranks: one small collective, and what rank 0 makes of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from dist_lowrank.telemetry import tags
from dist_lowrank.telemetry.causes import CAUSES

FIGURES = (*map(tags.memory_bytes, CAUSES), tags.OPTIMIZER_MILLISECONDS)


def gather_figures(values: Mapping[str, float], device: torch.device) -> dict[str, list[float]]:
    """What each rank has for each of `FIGURES` that any rank has, by tag; 0 of a rank that has no such figure.

    Collective: one all-gather over the default group, of `len(FIGURES)` float64 numbers of each rank, whatever they
    have, so that all ranks agree on its size.

    Args:
        values: what this rank logs, by tag; other tags than `FIGURES` are left out.

    Raises:
        ValueError: bytes are logged for what is not one of `CAUSES`.
    """
    prefix = tags.memory_bytes("")
    for tag in values:
        if tag.startswith(prefix) and tag not in FIGURES:
            raise ValueError(f"memory cause {tag.removeprefix(prefix)!r}: has no place; allowed: {', '.join(CAUSES)}")
    own = torch.tensor([float(values.get(tag, math.nan)) for tag in FIGURES], dtype=torch.float64, device=device)
    gathered = own.new_empty(dist.get_world_size() * len(FIGURES))
    dist.all_gather_into_tensor(gathered, own)
    by_figure = gathered.view(-1, len(FIGURES)).T.cpu()  # (figures, ranks)
    return {
        tag: figures.nan_to_num(0.0).tolist()
        for tag, figures in zip(FIGURES, by_figure, strict=True)
        if not figures.isnan().all()
    }


def statistics_over_ranks(by_rank: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Least, median and most of each figure over the ranks, and the (lowest) rank that has the most."""
    found: dict[str, float] = {}
    for tag, figures in by_rank.items():
        most = max(figures)
        found[tags.over_ranks(tag, "min")] = min(figures)
        found[tags.over_ranks(tag, "median")] = statistics.median(figures)
        found[tags.over_ranks(tag, "max")] = most
        found[tags.over_ranks(tag, "worst_rank")] = figures.index(most)
    return found
