"""What TensorBoard shows beside each rank's curves: charts, and of many ranks statistics and heat maps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from dist_lowrank.config.schema import TelemetryConfig
from dist_lowrank.telemetry import tags
from dist_lowrank.telemetry.causes import OF_STEP, is_cause, is_state
from dist_lowrank.telemetry.charts import layout_of_rank, layout_over_ranks
from dist_lowrank.telemetry.metrics import MetricsWriter
from dist_lowrank.telemetry.over_ranks import gather_figures, statistics_over_ranks

_MEMORY, _ENERGY = tags.memory_bytes(""), tags.captured_energy("")


class Dashboard:
    """Logs the entries of a rank's steps, with what they are of all ranks. One per rank, of the default group.

    With up to `telemetry.max_ranks_shown` ranks, each writes its curves and nothing is sent. With more, TensorBoard
    would have to hold too much and show too many curves: then rank 0 alone writes event files (see
    `writes_event_files`), and adds least, median, most and the rank of the most of memory by cause and of the
    optimizer's time, and at an interval a heat map, for which ranks tell each other their figures at each entry.

    Args:
        settings: the same on all ranks.
        metrics: of this rank.
        device: for what is sent.
    """

    def __init__(self, settings: TelemetryConfig, metrics: MetricsWriter, device: torch.device) -> None:
        self._settings, self._metrics, self._device = settings, metrics, device
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._causes: list[str] = []  # that have charts: of which there was something once
        self._families: list[str] = []  # that have charts
        self._by_rank: dict[str, list[float]] = {}  # what is known last of each cause; some are rarely measured
        self._drawn_step = -math.inf
        self._most_state_bytes = self._most_total_bytes = 0
        self._tokens_per_second: list[float] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the entry of a step. Collective where there are more ranks than shown (one small all-gather)."""
        memory = {tag.removeprefix(_MEMORY): int(n) for tag, n in values.items() if tag.startswith(_MEMORY)}
        self._most_state_bytes = max(self._most_state_bytes, sum(n for cause, n in memory.items() if is_state(cause)))
        held_through = [n for cause, n in memory.items() if is_cause(cause) and cause not in OF_STEP]
        self._most_total_bytes = max(self._most_total_bytes, sum(held_through))
        if tags.TOKENS_PER_SECOND in values:
            self._tokens_per_second.append(values[tags.TOKENS_PER_SECOND])
        families = [tag.removeprefix(_ENERGY) for tag in values if tag.startswith(_ENERGY)]
        if self._ranks <= self._settings.max_ranks_shown:
            self._show_charts([cause for cause, n in memory.items() if n], families)
            by_rank = {tags.memory_of_rank(self._rank, c): memory[c] for c in self._causes if c in memory}
            self._metrics.log(step, values, only_events=by_rank)
            return
        figures = gather_figures(values, self._device)
        if self._rank == 0:
            self._metrics.log(step, {**values, **statistics_over_ranks(figures)})
            self._by_rank |= {tag.removeprefix(_MEMORY): n for tag, n in figures.items() if tag.startswith(_MEMORY)}
            self._draw(step)
            self._show_charts([cause for cause, numbers in self._by_rank.items() if any(numbers)], families)
        else:
            self._metrics.log(step, values)

    def _draw(self, step: int) -> None:
        due = step - self._drawn_step >= self._settings.heat_map_interval
        if due and self._metrics.shows_events:
            from dist_lowrank.telemetry.heat_map import heat_map

            self._drawn_step = step
            title = f"Memory by rank and cause at step {step}; darkest: the most of a cause"
            self._metrics.image("memory_by_rank_and_cause", step, heat_map(self._by_rank, title))

    def _show_charts(self, causes: Iterable[str], families: Iterable[str]) -> None:
        """Says which charts there are, again when a cause or a family is new."""
        new_causes = [cause for cause in causes if cause not in self._causes]
        new_families = [family for family in families if family not in self._families]
        if new_causes or new_families:
            self._causes += new_causes
            self._families += new_families
            if self._ranks <= self._settings.max_ranks_shown:
                self._metrics.charts(layout_of_rank(self._causes, self._families, self._rank))
            else:
                self._metrics.charts(layout_over_ranks(self._causes, self._families))

    def final_figures(self) -> dict[str, float]:
        """Of all entries: the most `state_bytes` and `total_bytes` of any rank, and the mean `tokens_per_second`.

        Speed is without the first entry, in which everything warms up. Collective: one all-reduce of two numbers.
        """
        most = torch.tensor([self._most_state_bytes, self._most_total_bytes], device=self._device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        state_bytes, total_bytes = most.tolist()
        figures = {"state_bytes": state_bytes, "total_bytes": total_bytes}
        rates = self._tokens_per_second[1:] or self._tokens_per_second
        return {**figures, "tokens_per_second": statistics.harmonic_mean(rates)} if rates else figures


def writes_event_files(settings: TelemetryConfig, rank: int, ranks: int) -> bool:
    """Whether TensorBoard gets this rank's curves."""
    return settings.tensorboard and (rank == 0 or ranks <= settings.max_ranks_shown)
