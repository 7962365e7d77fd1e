"""One line per run in TensorBoard's HParams tab: what was chosen, and what came of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_lowrank.config import RunConfig, to_dict
from dist_lowrank.telemetry import tags

# Of the other sections; the optimizer's is shown as a whole.
_KEYS = (
    *("model.name", "data.source", "data.sequence_length", "strategy.name", "precision.name"),
    *("schedule.name", "schedule.warmup_fraction", "schedule.final_fraction"),
    *("train.steps", "train.global_batch_size", "train.micro_batch_size", "train.clip_norm", "seed"),
)


def hyperparameters(config: RunConfig, processes: int) -> dict[str, str | float]:
    """What runs are filtered by, under the keys of the command line; keys that are null are left out."""
    flat = _flatten(to_dict(config))
    chosen = {key: value for key, value in flat.items() if key in _KEYS or key.startswith("optimizer.")}
    return {**chosen, "processes": processes}


def _flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, str | float]:
    flat: dict[str, str | float] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = str(value) if isinstance(value, list | tuple | bool) else value
    return flat


def write_final(folder: Path, chosen: Mapping[str, str | float], figures: Mapping[str, float], step: int) -> None:
    """Writes a run's line as event files in a folder of their own.

    The tab shows every scalar beside the hyperparameters as a column, so a rank's folder would add all its curves. No
    list of columns is written either, as `SummaryWriter.add_hparams` would: TensorBoard takes that of any one run, and
    the keys of other optimizers would be missing. Left to itself it gathers them from all runs.

    Args:
        folder: none of a rank.
        figures: by name, without `final/`.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    _, start, end = hparams(dict(chosen), {})
    try:
        with SummaryWriter(str(folder)) as events:
            events.file_writer.add_summary(start)
            for name, value in figures.items():
                events.add_scalar(tags.final(name), value, step)
            events.file_writer.add_summary(end)
    except OSError as error:
        print(f"{folder}: {error.strerror}; the run is not in the HParams tab", file=sys.stderr, flush=True)
