"""The layout of TensorBoard's custom-scalars tab: which curves share a chart.

The tab shows in a chart every tag that matches one of its patterns, of every run that is selected; and each rank is a
run. So all ranks of a cause need only the cause's tag, but all causes of one rank need tags that name the rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from dist_lowrank.telemetry import tags

Chart = tuple[str, list[str]]  # its kind and its patterns
Layout = dict[str, dict[str, Chart]]  # by category and title

_LOSS = {"training": tags.LOSS_TRAIN, "validation": tags.LOSS_VALIDATION, "gradient norm": tags.GRADIENT_NORM}
_THROUGHPUT = {"tokens per second": tags.TOKENS_PER_SECOND, "model FLOP per second": tags.MODEL_FLOPS_PER_SECOND}
_OPTIMIZER = {"milliseconds per step": tags.OPTIMIZER_MILLISECONDS, "share of a step": tags.OPTIMIZER_SHARE}


def layout_of_rank(causes: Iterable[str], families: Iterable[str], rank: int) -> Layout:
    """One rank's part of the charts of all ranks by cause and of all causes by rank.

    TensorBoard merges the parts: charts of categories with one name are put together, and equal ones are shown once.
    All parts have the same categories, because it forgets charts of those that the first part lacks.

    Args:
        causes: of memory, of which this rank has some.
        families: of matrices, of which captured energy is logged.
    """
    return {
        "Memory by cause: all ranks of a cause, bytes": _charts({cause: tags.memory_bytes(cause) for cause in causes}),
        "Memory by rank: all causes of a rank, bytes": {f"rank {rank}": ("Multiline", [tags.memory_of_rank(rank, "")])},
        **_common(families),
    }


def layout_over_ranks(causes: Iterable[str], families: Iterable[str]) -> Layout:
    """Charts of least, median and most over the ranks, for more of them than curves can be told apart."""
    shown = {cause: tags.memory_bytes(cause) for cause in causes}
    shown["optimizer, milliseconds per step"] = tags.OPTIMIZER_MILLISECONDS
    extremes = {
        title: _lines(*(tags.over_ranks(tag, statistic) for statistic in ("min", "median", "max")))
        for title, tag in shown.items()
    }
    worst = {title: tags.over_ranks(tag, "worst_rank") for title, tag in shown.items()}
    return {
        "Over ranks: min, median, max": extremes,
        "Over ranks: the number of the worst": _charts(worst),
        **_common(families),
    }


def _common(families: Iterable[str]) -> Layout:
    energy = _charts({family: tags.captured_energy(family) for family in families})
    return {
        "Loss": _charts(_LOSS),
        "Throughput": _charts(_THROUGHPUT),
        "Optimizer": _charts(_OPTIMIZER),
        "Captured energy, share of 1": {"all families": ("Multiline", [tags.captured_energy("")]), **energy},
    }


def _charts(tag_by_title: dict[str, str]) -> dict[str, Chart]:
    return {title: _lines(tag) for title, tag in tag_by_title.items()}


def _lines(*exact_tags: str) -> Chart:
    """A chart of tags that match from the beginning to the end."""
    return "Multiline", [f"{re.escape(tag)}$" for tag in exact_tags]
