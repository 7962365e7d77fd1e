"""The numbers of a group of runs, by name: what tables show and assertions are about."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dist_lowrank.compare.groups import Group
from dist_lowrank.compare.runs import Rank, Run
from dist_lowrank.compare.traffic import Traffic
from dist_lowrank.telemetry import tags
from dist_lowrank.telemetry.causes import CAUSES

Curve = Sequence[tuple[int, float, float]]  # (tokens, seconds, value)


@dataclass(frozen=True, slots=True)
class Mean:
    """Over the seeds of a group."""

    mean: float
    spread: float  # sample standard deviation; 0 of a single run
    count: int
    interpolated: bool = False  # a validation loss that lies between two evaluations of a run

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Mean | None:
        """None if a run has no value, so that every mean is over the same runs."""
        found = list(values)
        present = [value for value in found if value is not None]
        if not present or len(present) < len(found):
            return None
        if not all(map(math.isfinite, present)):
            return cls(math.nan, math.nan, len(present))
        return cls(statistics.fmean(present), statistics.stdev(present) if len(present) > 1 else 0.0, len(present))


@dataclass(frozen=True, slots=True)
class LossRow:
    """The losses of all groups after the same number of tokens."""

    tokens: int
    validation: Sequence[Mean | None]  # by group; marked where it is between two evaluations, on their line
    train: Sequence[Mean | None]  # by group; over the tokens since the row before


def loss_rows(groups: Sequence[Group], most: int = 8) -> list[LossRow]:
    """At tokens at which every run was evaluated; at most `most` of them.

    Where there are none: at those of the first run that every run has reached, with interpolated losses.
    """
    runs = [run for group in groups for run in group.runs]
    reached = min(run.entries[-1].tokens for run in runs)
    evaluated = [[tokens for tokens, *_ in run.curve(tags.LOSS_VALIDATION)] for run in runs]
    points = sorted(set.intersection(*map(set, evaluated)) - {0})
    if not points:
        last = min(max(places, default=0) for places in evaluated)
        points = [tokens for tokens in evaluated[0] if 0 < tokens <= last] or [reached]
    if len(points) > most:
        points = [points[round((index + 1) * len(points) / most) - 1] for index in range(most)]
    rows = []
    for before, tokens in zip([0, *points], points, strict=False):
        validation = [_validation_at(group.runs, tokens) for group in groups]
        train = [Mean.of(mean_between(run.curve(tags.LOSS_TRAIN), before, tokens) for run in g.runs) for g in groups]
        rows.append(LossRow(tokens, validation, train))
    return rows


def _validation_at(runs: Sequence[Run], tokens: int) -> Mean | None:
    curves = [run.curve(tags.LOSS_VALIDATION) for run in runs]
    mean = Mean.of(value_at(curve, tokens) for curve in curves)
    between = any(tokens not in {place for place, *_ in curve} for curve in curves)
    return replace(mean, interpolated=True) if mean and between else mean


def value_at(curve: Curve, tokens: int) -> float | None:
    """On the line between the neighbours; None outside of the curve."""
    position = bisect_left(curve, tokens, key=lambda point: point[0])
    if position == len(curve):
        return None
    after, _, value = curve[position]
    if after == tokens:
        return value
    if position == 0:
        return None
    before, _, value_before = curve[position - 1]
    return value_before + (value - value_before) * (tokens - before) / (after - before)


def mean_between(curve: Curve, after: int, until: int) -> float | None:
    """Of the entries after a number of tokens, up to and with another; None if there are none."""
    values = [value for tokens, _, value in curve if after < tokens <= until]
    return statistics.fmean(values) if values else None


def quantities(group: Group, row: LossRow, index: int, traffic: Traffic | None) -> dict[str, Mean | None]:
    """All quantities of a group by their dotted names; None where it has no such number.

    Args:
        group: number `index` of those compared.
        row: the last number of tokens that all of them have reached.
        traffic: of the group; None where it could not be told.
    """
    runs = group.runs
    found: dict[str, Mean | None] = {
        "tokens": Mean.of(run.entries[-1].tokens for run in runs),
        "loss.validation": row.validation[index],
        "loss.train": row.train[index],
        "tokens_per_second": Mean.of(run.tokens_per_second for run in runs),
        "step_milliseconds": Mean.of(_step_milliseconds(run) for run in runs),
        "training_seconds": Mean.of(run.entries[-1].seconds for run in runs),
        "refresh_share": Mean.of(refresh_share(run) for run in runs),
        "captured_energy": Mean.of(_captured_energy(run) for run in runs),
        "sent_bytes.mean": Mean.of([traffic.mean_bytes if traffic else None]),
        "sent_bytes.refresh": Mean.of([traffic.refresh_bytes if traffic else None]),
    }
    over_ranks: dict[str, Callable[[Rank], float | None]] = {
        "optimizer_milliseconds": lambda rank: rank.optimizer_milliseconds,
        "optimizer_share": lambda rank: rank.optimizer_share,
        "state_bytes": lambda rank: rank.state_bytes,
        "total_bytes": lambda rank: rank.total_bytes,
        "peak_bytes": lambda rank: rank.peak_bytes,
    }
    for cause in causes([group]):
        over_ranks[f"memory_bytes.{cause}"] = lambda rank, cause=cause: rank.memory_bytes.get(cause)  # type: ignore[misc]
    for name, of_rank in over_ranks.items():
        for statistic, function in (("min", min), ("median", statistics.median), ("max", max)):
            found[f"{name}.{statistic}"] = Mean.of(
                function(values) if (values := _present(map(of_rank, run.ranks))) else None  # type: ignore[operator]
                for run in runs
            )
    return found


def causes(groups: Sequence[Group]) -> list[str]:
    """The names under which the groups' ranks logged bytes, in order."""
    return in_order(c for group in groups for run in group.runs for rank in run.ranks for c in rank.memory_bytes)


def in_order(names: Iterable[str]) -> list[str]:
    """Each name once: causes as they are shown everywhere, then what is not known."""
    return sorted(dict.fromkeys(names), key=lambda name: CAUSES.index(name) if name in CAUSES else len(CAUSES))


def memory_by_rank(group: Group, cause: str) -> list[int]:
    """Bytes of one cause by rank: the most of any seed."""
    ranks = zip(*(run.ranks for run in group.runs), strict=True)
    return [max(each.memory_bytes.get(cause, 0) for each in seeds) for seeds in ranks]


def peak_by_rank(group: Group) -> list[Mapping[str, int]]:
    """Bytes by cause at the peak of a tracked step, by rank: of the seed with the highest; empty without one."""
    ranks = zip(*(run.ranks for run in group.runs), strict=True)
    return [max((each.at_peak for each in seeds), key=lambda peak: peak.get("total", 0)) for seeds in ranks]


def captured_energy(group: Group, family: str) -> Mean | None:
    """The share (0 to 1) of one family's energy that was captured, over all logged steps."""
    return Mean.of(_mean_of(run.curve(tags.captured_energy(family))) for run in group.runs)


def refresh_share(run: Run) -> float | None:
    """What refreshes add to the time of a run, 0 to 1, from the optimizer's times at refreshes and between them.

    None where that cannot be told: refreshes at each step, spread over the steps, at the first step alone, or entries
    that cover more than one step.
    """
    optimizer, telemetry = run.config["optimizer"], run.config.get("telemetry", {})
    interval = optimizer.get("refresh_interval", 1)
    step_milliseconds = _step_milliseconds(run)
    if interval == 1 or optimizer.get("refresh_stagger") or telemetry.get("log_interval", 1) != 1:
        return None
    phase = 0 if optimizer["name"] == "dct_adamw" else 1  # the others refresh one step after the multiples
    timed = [each for each in run.entries[1:] if tags.OPTIMIZER_MILLISECONDS in each.values and each.step > 1]
    at_refresh, between = (
        [each.values[tags.OPTIMIZER_MILLISECONDS] for each in timed if (each.step % interval == phase) is refreshed]
        for refreshed in (True, False)
    )
    if not at_refresh or not between or step_milliseconds is None:
        return None
    added_milliseconds: float = max(0.0, statistics.median(at_refresh) - statistics.median(between))
    return added_milliseconds / int(interval) / step_milliseconds


def _step_milliseconds(run: Run) -> float | None:
    rate = run.tokens_per_second
    return 1000 * run.tokens_per_step / rate if rate else None


def _captured_energy(run: Run) -> float | None:
    shares = [_mean_of(run.curve(tags.captured_energy(family))) for family in run.families()]
    present = _present(shares)
    return statistics.fmean(present) if present else None


def _mean_of(curve: Curve) -> float | None:
    finite = [value for *_, value in curve if math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def ratio(value: Mean | None, baseline: Mean | None) -> float | None:
    """None without both, or of a baseline of 0."""
    return value.mean / baseline.mean if value and baseline and baseline.mean else None


Quantities = Mapping[str, "Mean | None"]
