"""A comparison as data for other programs: one number per line of CSV, or all of it as JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dist_lowrank.compare.comparison import Comparison
from dist_lowrank.compare.quantities import Mean
from dist_lowrank.compare.traffic import Traffic
from dist_lowrank.telemetry import tags


def csv_text(comparison: Comparison) -> str:
    """One number per line: run, seed, quantity, rank, tokens, value; empty where a column does not apply."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "seed", "quantity", "rank", "tokens", "value"])
    for group, values in zip(comparison.groups, comparison.quantities, strict=True):
        for name, value in values.items():
            if value is not None:
                mark = " (interpolated)" if value.interpolated else ""
                writer.writerow([group.label, "", f"{name}{mark}", "", "", repr(value.mean)])
                if value.count > 1:
                    writer.writerow([group.label, "", f"{name} (spread)", "", "", repr(value.spread)])
        for run in group.runs:
            for number, rank in enumerate(run.ranks):
                for cause, count in rank.memory_bytes.items():
                    writer.writerow([group.label, run.seed, f"memory_bytes.{cause}", number, "", count])
                for cause, count in rank.at_peak.items():
                    writer.writerow([group.label, run.seed, f"memory_at_peak_bytes.{cause}", number, "", count])
            for tag in (tags.LOSS_VALIDATION, tags.LOSS_TRAIN):
                for tokens, _, point in run.curve(tag):
                    writer.writerow([group.label, run.seed, tag.replace("/", "."), "", tokens, repr(point)])
    return text.getvalue()


def as_data(comparison: Comparison) -> dict[str, Any]:
    """The comparison as data that JSON can hold; what is not finite is null."""
    groups = []
    for group, values, traffic in zip(comparison.groups, comparison.quantities, comparison.traffic, strict=True):
        runs = [
            {
                "folder": run.given,
                "attempt": run.folder.attempt,
                "seed": run.seed,
                "finished": run.is_finished,
                "steps": run.entries[-1].step,
                "tokens": run.entries[-1].tokens,
                "memory_bytes_by_rank": [dict(rank.memory_bytes) for rank in run.ranks],
                "memory_at_peak_bytes_by_rank": [dict(rank.at_peak) for rank in run.ranks],
                "validation_loss": [_finite(point) for point in run.curve(tags.LOSS_VALIDATION)],
            }
            for run in group.runs
        ]
        sent = asdict(traffic) if isinstance(traffic, Traffic) else {"unknown": traffic}
        means = {name: _mean(value) for name, value in values.items()}
        groups.append({"label": group.label, "quantities": means, "sent": sent, "runs": runs})
    rows = [
        {"tokens": row.tokens, "validation": [*map(_mean, row.validation)], "train": [*map(_mean, row.train)]}
        for row in comparison.loss
    ]
    outcomes = [
        {"assertion": each.text, "run": each.label, "holds": each.holds, "numbers": dict(each.numbers)}
        for each in comparison.outcomes
    ]
    return {
        "baseline": comparison.groups[0].label,
        "notes": list(comparison.notes),
        "settings": {key: list(values) for key, values in comparison.settings.items()},
        "groups": groups,
        "loss_at_equal_tokens": rows,
        "assertions": outcomes,
    }


def _mean(value: Mean | None) -> dict[str, Any] | None:
    if value is None or not math.isfinite(value.mean):
        return None
    mark = {"interpolated": True} if value.interpolated else {}
    return {"mean": value.mean, "spread": value.spread, "runs": value.count} | mark


def _finite(point: Sequence[float]) -> list[float | None]:
    return [number if math.isfinite(number) else None for number in point]
