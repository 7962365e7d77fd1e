"""A comparison as plots: loss against tokens and time, memory per rank as bars and as a heat map, captured energy."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from dist_lowrank.compare.comparison import Comparison
from dist_lowrank.compare.groups import Group
from dist_lowrank.compare.quantities import Curve, causes, in_order, memory_by_rank, peak_by_rank, value_at
from dist_lowrank.compare.runs import Run
from dist_lowrank.telemetry import tags
from dist_lowrank.telemetry.causes import OF_STEP, is_cause

# Okabe and Ito's colours, which most colour-blind people can tell apart; more runs than colours change the dashes.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
# Of the same names in every comparison; other causes take what is left of the map.
_CAUSE_COLOURS = {
    "parameters": "#4C78A8",
    "gathered_parameters": "#2F4B7C",
    "master_weights": "#9ECAE9",
    "gradients": "#BAB0AC",
    "dense_moments": "#E45756",
    "moments": "#F58518",
    "indices": "#54A24B",
    "projection": "#88D27A",
    "error_feedback": "#B279A2",
    "dictionary": "#EECA3B",
    "shared_dictionary": "#C9A227",
    "other_state": "#9D755D",
    "refresh_workspace": "#FF9DA6",
    "collective_buffers": "#72B7B2",
    "checkpoint_copy": "#A0CBE8",
    "activations": "#D6A5C9",
    "temporaries": "#D8B5A5",
    "inputs": "#439894",
    "buffers": "#79706E",
    "diagnostics": "#86BCB6",
    "residual": "#D4D4D4",
}
_MOST_RANKS = 16  # with a bar each; of more, those with least, median and most
_BAR_LABEL = 18  # characters in a line of a label under bars
_LEAST_BARS = 3.5  # whose room such a label takes
_LEGEND_LABEL = 60  # characters in a line of a legend
_MOST_WRITTEN = 4  # ranks of a heat map that have their numbers written in
_BINS = 100  # of tokens, over which training losses are averaged


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure, and the name of its files."""

    name: str
    title: str
    figure: Figure

    def save(self, path: Path) -> None:
        """As SVG or PNG, by the suffix. SVG files are the same for the same numbers."""
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
            self.figure.savefig(path, metadata=metadata, dpi=150)


def plots(comparison: Comparison) -> list[Plot]:
    """All plots for which there are numbers."""
    made = [_loss(comparison.groups), *_memory(comparison.groups), _heat_map(comparison.groups)]
    if any(run.families() for group in comparison.groups for run in group.runs):
        made.append(_energy(comparison.groups))
    return made


def _loss(groups: Sequence[Group]) -> Plot:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    lines: dict[str, Any] = {}
    for index, group in enumerate(groups):
        style = {"color": _COLOURS[index % len(_COLOURS)], "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)]}
        rows = _binned(group)
        tokens, seconds, mean, low, high = ([row[column] for row in rows] for column in range(5))
        for axes, places in ((by_tokens, tokens), (by_time, seconds)):
            (line,) = axes.plot(places, mean, linewidth=1.5, **style)
            if len(group.runs) > 1:
                axes.fill_between(places, low, high, color=style["color"], alpha=0.2, linewidth=0)
        lines[group.label] = line
        for run in group.runs:
            curve = run.curve(tags.LOSS_VALIDATION)
            for axes, column in ((by_tokens, 0), (by_time, 1)):
                places, losses = [point[column] for point in curve], [point[2] for point in curve]
                axes.plot(places, losses, "o", color=style["color"], markersize=4, markeredgecolor="white")
    by_tokens.set(xlabel="tokens", ylabel="loss (nats per token)")
    by_time.set(xlabel="training time (seconds, without evaluations)")
    by_tokens.xaxis.set_major_formatter(EngFormatter())
    for axes in (by_tokens, by_time):
        _clean(axes)
    _legend(figure, lines, title="line: training   dots: validation")
    several = any(len(group.runs) > 1 for group in groups)
    return Plot("loss", "Loss against tokens and time" + (" (band: lowest to highest seed)" if several else ""), figure)


def _binned(group: Group) -> list[tuple[float, float, float, float, float]]:
    """(tokens, seconds, mean, lowest, highest) of the training losses in bins of tokens, over the seeds."""
    curves = [run.curve(tags.LOSS_TRAIN) for run in group.runs]
    reached = min(curve[-1][0] for curve in curves)
    count = min(_BINS, *(len(curve) for curve in curves))
    rows = []
    for index in range(count):
        after, until = reached * index / count, reached * (index + 1) / count
        members = [[point for point in curve if after < point[0] <= until] for curve in curves]
        if all(members):
            means = [_mean(points, 2) for points in members]
            tokens, seconds = (_mean([p for points in members for p in points], column) for column in (0, 1))
            rows.append((tokens, seconds, sum(means) / len(means), min(means), max(means)))
    return rows


def _mean(points: Curve, column: int) -> float:
    return sum(point[column] for point in points) / len(points)


def _memory(groups: Sequence[Group]) -> list[Plot]:
    """What ranks hold through the steps; and at the peak of a step, for the runs that tracked one."""
    held = [{cause: memory_by_rank(group, cause) for cause in causes([group]) if is_cause(cause)} for group in groups]
    made = [_bars("memory", "Memory per rank by cause, held through the steps", groups, held)]
    if tracked := [group for group in groups if any(peak_by_rank(group))]:
        at_peak = []
        for group in tracked:
            peaks = peak_by_rank(group)
            names = dict.fromkeys(cause for peak in peaks for cause in peak if cause != "total")
            at_peak.append({cause: [max(0, peak.get(cause, 0)) for peak in peaks] for cause in names})
        made.append(_bars("memory_at_peak", "Memory per rank by cause, at the peak of a step", tracked, at_peak))
    return made


def _bars(name: str, title: str, groups: Sequence[Group], held: Sequence[Mapping[str, list[int]]]) -> Plot:
    """Stacked bars: one per rank, the ranks of a run next to each other.

    Args:
        held: by group: bytes by rank, by cause.
    """
    names = in_order(cause for of_group in held for cause in of_group)
    shown = [_shown_ranks(group) for group in groups]
    figure = Figure(
        figsize=(max(7.0, 2.5 + 0.45 * sum(max(_LEAST_BARS, len(ranks)) for ranks in shown)), 4.5), layout="constrained"
    )
    axes = figure.subplots()
    places: list[list[float]] = []
    for ranks in shown:
        start = places[-1][0] + max(_LEAST_BARS, len(places[-1]) + 0.8) if places else 0.0
        places.append([start + offset for offset in range(len(ranks))])
    bottoms = [[0.0] * len(ranks) for ranks in shown]
    spare = iter(matplotlib.colormaps["tab20b"].colors * 4)  # type: ignore[attr-defined]
    for cause in names:
        colour = _CAUSE_COLOURS.get(cause) or next(spare)
        label = _plain(cause)
        for of_group, ranks, where, bottom in zip(held, shown, places, bottoms, strict=True):
            by_rank = of_group.get(cause, [])
            heights = [by_rank[rank] for rank in ranks] if by_rank else []
            if any(heights):
                axes.bar(
                    where, heights, 0.85, bottom=bottom, color=colour, label=label, edgecolor="white", linewidth=0.3
                )
                label = "_" if label else label  # once in the legend
                bottom[:] = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xticks([x for where in places for x in where], [str(rank) for ranks in shown for rank in ranks])
    for group, where in zip(groups, places, strict=True):
        middle = (where[0] + where[-1]) / 2
        axes.annotate(
            _wrapped(group.label, _BAR_LABEL), (middle, 0), (0, -36), ha="center", va="top",
            xycoords="data", textcoords="offset points", annotation_clip=False, fontsize=9,
        )  # fmt: skip
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set(ylabel="memory (bytes)", xlabel="rank")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    _clean(axes)
    return Plot(name, title, figure)


def _heat_map(groups: Sequence[Group]) -> Plot:
    """One panel per run, a row per cause, a column per rank; dark: close to the most of any rank and run."""
    names = [
        cause
        for cause in causes(groups)
        if (is_cause(cause) or cause in OF_STEP) and any(any(memory_by_rank(group, cause)) for group in groups)
    ]
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(3.2 * columns + 2.2, (0.32 * len(names) + 0.9) * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    held = [[memory_by_rank(group, cause) for cause in names] for group in groups]
    most = [max(max(of_group[row]) for of_group in held) for row in range(len(names))]
    for group, of_group, axes in zip(groups, held, panels, strict=False):
        shares = [[count / top for count in by_rank] for by_rank, top in zip(of_group, most, strict=True)]
        mesh = axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.3)
        mesh.set_rasterized(group.world_size > _MOST_RANKS)
        axes.set_title(_wrapped(group.label, 34), fontsize=9)
        axes.set_yticks([row + 0.5 for row in range(len(names))], [_plain(cause) for cause in names], fontsize=9)
        axes.tick_params(length=0)
        if group.world_size <= _MOST_RANKS:
            axes.set_xticks([rank + 0.5 for rank in range(group.world_size)], map(str, range(group.world_size)))
        if group.world_size <= _MOST_WRITTEN:
            for row, by_rank in enumerate(of_group):
                for rank, count in enumerate(by_rank):
                    colour = "white" if shares[row][rank] > 0.6 else "#333333"
                    place = (rank + 0.5, row + 0.5)
                    axes.annotate(_short(count), place, ha="center", va="center", fontsize=7, color=colour)
    panels[0].invert_yaxis()  # of all panels: they share it
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    figure.supxlabel("rank", fontsize=10)
    bar = figure.colorbar(mesh, ax=panels, shrink=0.9, aspect=30)
    bar.set_label("of the most of any rank and run", fontsize=8)
    return Plot("memory_heat_map", "Memory by rank and cause (bytes; colour: against the most of its row)", figure)


def _short(count: int) -> str:
    return EngFormatter(places=1, sep="")(count) if count >= 1000 else str(count or "")


def _shown_ranks(group: Group) -> list[int]:
    if group.world_size <= _MOST_RANKS:
        return list(range(group.world_size))
    ordered = sorted(range(group.world_size), key=lambda rank: (group.first.ranks[rank].total_bytes, rank))
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def _energy(groups: Sequence[Group]) -> Plot:
    """One panel per family of matrices."""
    families = list(dict.fromkeys(family for group in groups for run in group.runs for family in run.families()))
    columns = min(4, len(families))
    rows = -(-len(families) // columns)
    figure = Figure(figsize=(2.9 * columns + 0.5, 2.3 * rows + 0.8), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    lines: dict[str, Any] = {}
    for family, axes in zip(families, panels, strict=False):
        for index, group in enumerate(groups):
            points = _energy_curve(group.runs, family)
            if points:
                style = _DASHES[index // len(_COLOURS) % len(_DASHES)]
                colour = _COLOURS[index % len(_COLOURS)]
                (line,) = axes.plot(*zip(*points, strict=True), linestyle=style, color=colour, linewidth=1.3)
                lines.setdefault(group.label, line)
        axes.set_title(_plain(family), fontsize=9)
        axes.set_ylim(0, 1)
        axes.xaxis.set_major_formatter(EngFormatter())
        _clean(axes)
    for axes in panels[len(families) - columns : len(families)]:
        axes.tick_params(labelbottom=True)  # the lowest of its column
    for axes in panels[len(families) :]:
        axes.set_visible(False)
    figure.supxlabel("tokens", fontsize=10)
    figure.supylabel("share of the energy that is captured", fontsize=10)
    _legend(figure, lines)
    return Plot("captured_energy", "Captured energy by family of matrices", figure)


def _energy_curve(runs: Sequence[Run], family: str) -> list[tuple[int, float]]:
    """(tokens, share), the mean over seeds where all have one."""
    curves = [run.curve(tags.captured_energy(family)) for run in runs]
    points = []
    for tokens, *_ in curves[0]:
        shares = [share for curve in curves if (share := value_at(curve, tokens)) is not None]
        if len(shares) == len(curves):
            points.append((tokens, sum(shares) / len(shares)))
    return points


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(figure: Figure, lines: Mapping[str, Any], title: str | None = None) -> None:
    """Above the panels, in as many columns as there is room for."""
    longest = min(_LEGEND_LABEL, max(map(len, lines)))
    columns = max(1, min(len(lines), int(figure.get_figwidth() * 10 / (longest + 8))))  # ten characters to the inch
    figure.legend(
        lines.values(), [_wrapped(label, _LEGEND_LABEL) for label in lines],
        loc="outside upper center", ncols=columns, frameon=False, title=title,
    )  # fmt: skip


def _wrapped(label: str, width: int) -> str:
    """In lines of at most so many characters."""
    return _plain("\n".join(textwrap.wrap(label, width)))


def _plain(text: str) -> str:
    """Without what matplotlib would take for a formula."""
    return text.replace("$", r"\$")
