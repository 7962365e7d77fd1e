"""What the optimizers of stored runs send, told from their configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_lowrank.compare.runs import Run
from dist_lowrank.config import ConfigError, from_dict

if TYPE_CHECKING:
    from dist_lowrank.training.traffic_forecast import TrafficRow


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes per step that rank 0 hands over for the optimizer, without what the strategy sends for the model."""

    mean_bytes: float | None  # over all steps; None if refreshes are staggered
    refresh_bytes: int  # at the step of a refresh; of any step, if every step refreshes
    other_bytes: int  # at the steps between refreshes; 0 if there are none
    rows: Sequence[TrafficRow]


def forecast(run: Run) -> Traffic | str:
    """From the stored configuration and the number of ranks; or why it cannot be told.

    The optimizer's traffic depends on shapes and layouts alone, so this is what the run sent, unless gradients had a
    lower rank than the subspace of an SVD: then somewhat more.
    """
    try:
        config = from_dict(dict(run.config))
    except ConfigError as error:
        return f"stored by another version: {str(error).splitlines()[0]}"

    from dist_lowrank.training.traffic_forecast import forecast_traffic  # slow: imports torch and transformers

    try:
        rows = forecast_traffic(config, len(run.ranks))
    except (ConfigError, OSError, ValueError) as error:  # such as a pretrained model that has moved
        return str(error).splitlines()[0]
    optimizer = run.config["optimizer"]
    return summarize(rows, optimizer.get("refresh_interval", 1), staggered=optimizer.get("refresh_stagger", False))


def summarize(rows: Sequence[TrafficRow], refresh_interval: int, *, staggered: bool = False) -> Traffic:
    """Rows of a forecast as bytes per step."""
    every = _bytes(rows, "every step")
    refresh, between = _bytes(rows, "refresh"), _bytes(rows, "between refreshes")
    mean = every + (refresh + between * (refresh_interval - 1)) / refresh_interval
    for row in rows:
        if row.step.startswith("every ") and row.step.endswith(" steps"):
            mean += row.bytes / int(row.step.split()[1])
    other = every + between if refresh_interval > 1 else 0
    return Traffic(None if staggered else mean, every + refresh, other, rows)


def _bytes(rows: Sequence[TrafficRow], step: str) -> int:
    return sum(row.bytes for row in rows if row.step == step)
