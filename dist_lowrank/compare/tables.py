"""A comparison as tables of text, the same for Markdown and HTML."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_lowrank.compare.quantities import Mean, captured_energy, causes, in_order, memory_by_rank, peak_by_rank, ratio
from dist_lowrank.compare.traffic import Traffic
from dist_lowrank.telemetry.causes import OF_STEP, is_cause, is_state

if TYPE_CHECKING:
    from dist_lowrank.compare.comparison import Comparison

NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """Cells of text under headings; the first column is to the left, numbers are to the right."""

    title: str
    explanation: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(comparison: Comparison) -> list[Table]:
    """All tables, the most important first."""
    made = [
        _summary(comparison),
        _assertions(comparison),
        _runs(comparison),
        _settings(comparison),
        _loss(comparison),
        _memory(comparison),
        _peak(comparison),
        _speed(comparison),
        _traffic(comparison),
        _energy(comparison),
    ]
    return [table for table in made if table.rows]


def title(comparison: Comparison) -> str:
    """Of the report: `adamw and dct_adamw`, and how many more."""
    labels = [group.label for group in comparison.groups]
    if len(labels) > 3:
        labels = [*labels[:2], f"{len(labels) - 2} more"]
    return " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)


def _summary(comparison: Comparison) -> Table:
    baseline = comparison.quantities[0]
    names = ("loss.validation", "state_bytes.max", "total_bytes.max", "tokens_per_second", "sent_bytes.mean")
    rows = []
    for group, values in zip(comparison.groups, comparison.quantities, strict=True):
        loss, state, total, speed, sent = (values.get(name) for name in names)
        rows.append(
            [
                group.label,
                _number(loss, "{:.4f}"),
                _difference(loss, baseline["loss.validation"]),
                _number(state, "{:,.0f}"),
                _times(state, baseline["state_bytes.max"]),
                _times(total, baseline["total_bytes.max"]),
                _number(speed, "{:,.0f}"),
                _times(speed, baseline["tokens_per_second"]),
                _number(sent, "{:,.0f}"),
            ]
        )
    return Table(
        f"Summary after {comparison.loss[-1].tokens:,} tokens",
        f"Loss in nats per token on held-out text; lower is better. Bytes of the rank that holds most. "
        f"Differences and factors are against {comparison.groups[0].label}. Sent: what the optimizer sends per step.",
        [
            "run",
            "validation loss",
            "difference",
            "optimizer state, bytes",
            "state, factor",
            "all memory, factor",
            "tokens/s",
            "speed, factor",
            "sent bytes/step",
        ],
        rows,
    )


def _runs(comparison: Comparison) -> Table:
    rows = []
    given = [run.given for group in comparison.groups for run in group.runs]
    above = os.path.commonpath(given) if len(given) > 1 and len({*map(os.path.isabs, given)}) == 1 else ""
    for group in comparison.groups:
        for run in group.runs:
            done, steps = run.entries[-1].step, run.config["train"]["steps"]
            rows.append(
                [
                    group.label,
                    str(run.seed),
                    f"{done:,} of {steps:,}" + ("" if run.is_finished else ", unfinished"),
                    f"{run.entries[-1].tokens:,}",
                    str(len(run.ranks)),
                    run.config["strategy"]["name"],
                    run.config["precision"]["name"],
                    os.path.relpath(run.given, above) if above else run.given,
                ]
            )
    headings = ["run", "seed", "steps", "tokens", "ranks", "strategy", "precision", "folder"]
    explanation = "Runs that differ in nothing but the seed stand under one name."
    if above:
        explanation += f" The folders are in {above}."
    return Table("Runs", explanation, headings, rows)


def _settings(comparison: Comparison) -> Table:
    rows = [[key, *(value or NOTHING for value in values)] for key, values in comparison.settings.items()]
    return Table(
        "Settings that differ",
        f"All others are equal. {NOTHING}: has no such key.",
        ["key", *_labels(comparison)],
        rows,
    )


def _loss(comparison: Comparison) -> Table:
    headings = ["tokens"]
    headings += [f"{label}, {part}" for part in ("validation", "training") for label in _labels(comparison)]
    rows = [
        [f"{row.tokens:,}", *(_number(each, "{:.4f}") for each in (*row.validation, *row.train))]
        for row in comparison.loss
    ]
    explanation = (
        "Nats per token. ~: the run was not evaluated right there, the loss is on the line between its neighbouring "
        "evaluations. Training loss is the mean since the row before. ± is the standard deviation over seeds."
    )
    return Table("Loss at equal tokens", explanation, headings, rows)


def _memory(comparison: Comparison) -> Table:
    rows = []
    for group in comparison.groups:
        for cause in causes([group]):
            by_rank = memory_by_rank(group, cause)
            if any(by_rank):
                rows.append([group.label, cause, _kind(cause), *_over_ranks(by_rank)])
        for name, of_rank in (("optimizer state", "state_bytes"), ("all memory", "total_bytes")):
            ranks = zip(*(run.ranks for run in group.runs), strict=True)
            rows.append([group.label, name, "sum", *_over_ranks([max(getattr(r, of_rank) for r in s) for s in ranks])])
    explanation = (
        "Bytes, of each cause the most at any logged step. Worst: the number of the rank that holds most, - where all "
        "hold the same. What is marked as state is what the optimizer holds between steps, its dictionary included. "
        "All memory: what is held from step to step; what a step takes beside it is in the table of its peak."
    )
    headings = ["run", "cause", "kind", "min", "median", "max", "worst rank", "sum over ranks"]
    return Table("Memory per rank by cause", explanation, headings, rows)


def _kind(cause: str) -> str:
    if cause in OF_STEP:
        return "in a step"
    return "state" if is_state(cause) else "" if is_cause(cause) else "not a cause"


def _peak(comparison: Comparison) -> Table:
    rows = []
    for group in comparison.groups:
        peaks = peak_by_rank(group)
        for cause in in_order(cause for peak in peaks for cause in peak):
            by_rank = [peak.get(cause, 0) for peak in peaks]
            if any(by_rank):
                rows.append([group.label, cause, *_over_ranks(by_rank)])
    explanation = (
        "Bytes at the moment of a tracked step (telemetry.memory_tracker_steps) at which a rank held the most. Causes "
        "and the residual, which they do not explain, add up to the total, which is measured."
    )
    headings = ["run", "cause", "min", "median", "max", "worst rank", "sum over ranks"]
    return Table("Memory at the peak of a step", explanation, headings, rows)


def _speed(comparison: Comparison) -> Table:
    rows = []
    for group, values in zip(comparison.groups, comparison.quantities, strict=True):
        shares = [values[f"optimizer_share.{name}"] for name in ("min", "median", "max")]
        rows.append(
            [
                group.label,
                _number(values["tokens_per_second"], "{:,.0f}"),
                _number(values["step_milliseconds"], "{:,.1f}"),
                _number(values["optimizer_milliseconds.median"], "{:,.2f}"),
                *(_number(share, "{:.1%}") for share in shares),
                _number(values["refresh_share"], "{:.1%}"),
            ]
        )
    explanation = (
        "Means over the logged steps, without the first. Tokens of all ranks. The optimizer's share of a step's "
        "time: of the rank with the smallest, the median and the largest. Refresh: what refreshes add to the time of "
        "the run; it shows where refreshes are apart and every step is logged."
    )
    headings = [
        "run",
        "tokens/s",
        "ms/step",
        "optimizer ms (median rank)",
        "share min",
        "share median",
        "share max",
        "refresh",
    ]
    return Table("Speed", explanation, headings, rows)


def _traffic(comparison: Comparison) -> Table:
    rows = []
    for group, traffic in zip(comparison.groups, comparison.traffic, strict=True):
        if isinstance(traffic, Traffic):
            for row in traffic.rows:
                calls = "" if row.purpose == "nothing" else str(row.collectives)
                rows.append([group.label, row.step, row.purpose, row.operation, calls, f"{row.bytes:,}"])
        elif traffic:
            rows.append([group.label, f"unknown: {traffic}", "", "", "", NOTHING])
    explanation = (
        "What the optimizer hands over on rank 0, told from shapes and layouts. Not in it: what the strategy sends for "
        "gradients and weights."
    )
    headings = ["run", "step", "purpose", "operation", "collectives", "bytes"]
    return Table("Bytes on the wire", explanation, headings, rows)


def _energy(comparison: Comparison) -> Table:
    families = dict.fromkeys(f for group in comparison.groups for run in group.runs for f in run.families())
    with_energy = [group for group in comparison.groups if any(run.families() for run in group.runs)]
    rows = [
        [family, *(_number(captured_energy(group, family), "{:.1%}") for group in with_energy)] for family in families
    ]
    explanation = (
        "Share of what was projected that lies in the chosen directions, mean over matrices of the family and logged "
        "steps."
    )
    return Table("Captured energy", explanation, ["family", *(group.label for group in with_energy)], rows)


def _assertions(comparison: Comparison) -> Table:
    rows = [
        [
            outcome.text,
            outcome.label,
            "holds" if outcome.holds else "DOES NOT HOLD",
            outcome.shown,
        ]
        for outcome in comparison.outcomes
    ]
    return Table("Assertions", "", ["assertion", "run", "outcome", "numbers"], rows)


def _labels(comparison: Comparison) -> list[str]:
    return [group.label for group in comparison.groups]


def _over_ranks(by_rank: Sequence[int]) -> list[str]:
    numbers: list[Callable[[Sequence[int]], float]] = [min, statistics.median, max]
    worst = str(by_rank.index(max(by_rank))) if len(set(by_rank)) > 1 else NOTHING
    return [*(f"{number(by_rank):,.0f}" for number in numbers), worst, f"{sum(by_rank):,}"]


def _number(value: Mean | None, form: str) -> str:
    if value is None:
        return NOTHING
    spread = f" ± {form.format(value.spread)}" if value.spread else ""
    return ("~" if value.interpolated else "") + form.format(value.mean) + spread


def _difference(value: Mean | None, baseline: Mean | None) -> str:
    if value is None or baseline is None:
        return NOTHING
    return ("~" if value.interpolated or baseline.interpolated else "") + f"{value.mean - baseline.mean:+.4f}"


def _times(value: Mean | None, baseline: Mean | None) -> str:
    factor = ratio(value, baseline)
    return NOTHING if factor is None else f"{factor:.3f}"


def numeric_columns(table: Table) -> list[bool]:
    """Which columns hold nothing but numbers."""
    columns = zip(*table.rows, strict=True)
    return [all(_is_number(cell) for cell in column) and any(column) for column in columns]


def _is_number(cell: str) -> bool:
    return all(character in "0123456789.,+-±~% " for character in cell.replace("nan", "").replace("e-", ""))


def one_line(text: str) -> str:
    """Without line breaks, and without what a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def aligned(table: Table, shown: Callable[[str], str]) -> list[list[str]]:
    """The headings and rows as `shown` writes their cells, padded to columns."""
    cells = [[shown(cell) for cell in row] for row in (table.headings, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    columns = list(zip(widths, numeric_columns(table), strict=True))
    return [[c.rjust(w) if right else c.ljust(w) for c, (w, right) in zip(row, columns, strict=True)] for row in cells]
