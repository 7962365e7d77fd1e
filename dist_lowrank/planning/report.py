"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy

from dist_lowrank.config.schema import RunConfig
from dist_lowrank.planning.plan import Plan
from dist_lowrank.tables import empty_table
from dist_lowrank.training.shares import Bytes
from dist_lowrank.training.traffic_forecast import TrafficRow

EACH_RANK = 16  # up to so many ranks, each is told
_MOMENTS = ("peak at the start", "peak of forward and backward", "peak of the update", "peak")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a plan fits a device."""

    device: str
    capacity_bytes: int
    margin: float  # share of it that is left for what no plan sees
    allowed_bytes: int
    peak_bytes: int  # of the worst rank
    fits: bool
    largest_micro_batch: int | None
    largest_rank: int | None


@dataclass(frozen=True, slots=True)
class Report:
    """All that `dist-lowrank plan` tells."""

    config: RunConfig
    plan: Plan
    verdict: Verdict | None
    optimizer_traffic: Sequence[TrafficRow]
    strategy_traffic: Sequence[TrafficRow]


def rows(plan: Plan) -> Bytes:
    """Bytes by cause and rank, then the sums at the peaks of the three moments, and the highest."""
    if not plan.is_traced:
        return plan.by_cause()
    start = numpy.full(plan.world_size, plan.start_bytes, dtype=numpy.int64)
    totals = zip(_MOMENTS, (start, plan.forward_backward_bytes, plan.update_bytes, plan.peak_bytes), strict=True)
    return {**plan.by_cause(), **dict(totals)}


def columns(plan: Plan) -> Sequence[tuple[str, Mapping[str, int]]]:
    """Headings and numbers: ranks that hold the same are one column; of many ranks the least, median, most, worst."""
    table = rows(plan)
    kinds = kinds_of_ranks(plan)
    if len(kinds) == 1:
        return [(ranks_name(0, plan.world_size - 1), kinds[0]["bytes"])]
    if plan.world_size <= EACH_RANK:
        by_rank = [tuple(int(table[name][rank]) for name in table) for rank in range(plan.world_size)]
        found = []
        for values, members in groupby(range(plan.world_size), key=by_rank.__getitem__):
            first, *others = members
            found.append((ranks_name(first, first + len(others)), dict(zip(table, values, strict=True))))
        return found
    worst = plan.worst_rank
    return [
        ("min", {name: int(counts.min()) for name, counts in table.items()}),
        ("median", {name: int(numpy.median(counts)) for name, counts in table.items()}),
        ("max", {name: int(counts.max()) for name, counts in table.items()}),
        (f"worst, rank {worst}", {name: int(counts[worst]) for name, counts in table.items()}),
    ]


def kinds_of_ranks(plan: Plan) -> list[dict[str, Any]]:
    """Ranks that hold the same, from the first to the last of each run of neighbours, with their bytes."""
    table = rows(plan)
    stacked = numpy.stack([*table.values()])  # (rows, ranks)
    changes = numpy.flatnonzero((stacked[:, 1:] != stacked[:, :-1]).any(axis=0)) + 1
    edges = [0, *changes.tolist(), plan.world_size]
    return [
        {"first_rank": first, "last_rank": stop - 1, "bytes": {name: int(each[first]) for name, each in table.items()}}
        for first, stop in pairwise(edges)
    ]


def as_json(report: Report) -> dict[str, Any]:
    """The report in types of JSON."""
    plan, config = report.plan, report.config
    return {
        "model": config.model.name,
        "optimizer": config.optimizer.name,
        "strategy": config.strategy.name,
        "precision": config.precision.name,
        "ranks": plan.world_size,
        "micro_batch_size": plan.micro_batch_size,
        "sequence_length": config.data.sequence_length,
        "memory": kinds_of_ranks(plan),
        "estimated": sorted(cause for cause, count in plan.step.items() if count),
        "notes": list(plan.notes),
        "verdict": None if report.verdict is None else asdict(report.verdict),
        "optimizer_sends": [asdict(row) for row in report.optimizer_traffic],
        "strategy_sends": [asdict(row) for row in report.strategy_traffic],
    }


def print_report(report: Report) -> None:
    """To the console."""
    plan, config = report.plan, report.config
    ranks = "1 rank" if plan.world_size == 1 else f"{plan.world_size} ranks"
    print(
        f"plan       {config.model.name}, {config.optimizer.name}, {config.strategy.name}, {config.precision.name}: "
        f"{ranks}, micro-batch of {plan.micro_batch_size} x {config.data.sequence_length} tokens\n"
    )
    console, table = empty_table()
    table.add_column("bytes", no_wrap=True)
    found = columns(plan)
    for heading, _ in found:
        table.add_column(heading, justify="right", no_wrap=True)
    for name in rows(plan):
        mark = " ~" if name in plan.step else ""
        table.add_row(name + mark, *(f"{numbers[name]:,}" for _, numbers in found), end_section=False)
    console.print(table)
    if plan.world_size > EACH_RANK and len(found) > 1:
        print(_told_kinds(plan))
    if plan.is_traced:
        print("~ estimated: the most of each cause at any moment, and the sums at the peaks; all others to the byte")
    else:
        print("not traced: what lives within a step alone, such as activations, is missing, and so are peaks")
        if any(plan.step.values()):
            print("~ estimated; all others to the byte")
    for note in plan.notes:
        print(f"  {note}")
    _print_traffic(report)
    if report.verdict is not None:
        print("\n" + verdict_line(report))


def verdict_line(report: Report) -> str:
    """What the verdict is, and what else would fit."""
    verdict, plan = report.verdict, report.plan
    assert verdict is not None
    rank = plan.worst_rank
    moments = {
        "in forward and backward": int(plan.forward_backward_bytes[rank]),
        "at the update": int(plan.update_bytes[rank]),
        "at the start, when each rank makes the whole model": plan.start_bytes,
    }
    moment = max(moments, key=moments.__getitem__)
    text = (
        f"{'fits' if verdict.fits else 'does not fit'}: {_gib(verdict.peak_bytes)} on rank {rank}, "
        f"{moment}; allowed {_gib(verdict.allowed_bytes)}, "
        f"{verdict.device} less {verdict.margin:.0%}"
    )
    if verdict.largest_micro_batch is not None:
        text += f"\nlargest micro-batch that fits: {verdict.largest_micro_batch or 'none'}"
    if verdict.largest_rank is not None:
        text += f"\nlargest rank of the subspace that fits: {verdict.largest_rank or 'none'}"
    return text


def _told_kinds(plan: Plan) -> str:
    kinds = kinds_of_ranks(plan)
    told = [ranks_name(kind["first_rank"], kind["last_rank"]) for kind in kinds[:4]]
    return f"{len(kinds)} kinds of ranks: {', '.join(told)}{', ...' if len(kinds) > 4 else ''} (all with --json)"


def _print_traffic(report: Report) -> None:
    console, table = empty_table()
    for heading in ("sent by rank 0", "step", "purpose", "operation"):
        table.add_column(heading, no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for sender, sent in (("strategy", report.strategy_traffic), ("optimizer", report.optimizer_traffic)):
        for row in sent:
            table.add_row(sender, row.step, row.purpose, row.operation, f"{row.bytes:,}")
    if table.row_count:
        print()
        console.print(table)


def ranks_name(first: int, last: int) -> str:
    """Of one rank, or of a run of neighbours."""
    return f"rank {first}" if first == last else f"ranks {first}-{last}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
