"""Planned against measured: a run's plan beside what its ranks logged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dist_lowrank.compare.runs import read_run
from dist_lowrank.config import RunFolder, from_dict
from dist_lowrank.planning.plan import Planner
from dist_lowrank.planning.report import ranks_name
from dist_lowrank.tables import empty_table
from dist_lowrank.telemetry import tags
from dist_lowrank.telemetry.causes import OF_STEP, RESIDUAL, is_cause

TOTAL = "peak"  # of all causes together


@dataclass(frozen=True, slots=True)
class Reconciled:
    """Bytes of a run by cause; a list has an entry per rank, None where nothing was measured."""

    run: str
    planned: Mapping[str, Sequence[int]]
    measured: Mapping[str, Sequence[int | None]]
    notes: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """In types of JSON."""
        causes = {
            cause: {"planned": list(planned), "measured": list(self.measured[cause])}
            for cause, planned in self.planned.items()
        }
        return {"run": self.run, "bytes": causes, "notes": list(self.notes)}


def reconcile(run: str) -> Reconciled:
    """Plans a run as it was configured, and reads what it measured; as far as it measured.

    What lives within a step is measured at the steps that `telemetry.memory_tracker_steps` names, and on a GPU the
    peak of all at each logged step. `residual` is of things that no plan knows, on a CPU also the run's data.

    Raises:
        ConfigError: no run is there, or it is of another version.
    """
    found = read_run(run)
    config = from_dict(dict(found.config))
    world_size = len(found.ranks)
    plan = Planner(config, world_size).plan()
    planned = {cause: count.tolist() for cause, count in plan.by_cause().items()}
    planned[TOTAL] = plan.peak_bytes.tolist()
    logged = (c for rank in found.ranks for c in rank.memory_bytes if is_cause(c) or c in OF_STEP)
    measured = {
        cause: [rank.memory_bytes.get(cause) for rank in found.ranks] for cause in dict.fromkeys((*planned, *logged))
    }
    total = (tags.memory_bytes("allocator_peak"), tags.memory_at_peak_bytes("total"))
    measured[TOTAL] = [_most(found.folder, rank, total) for rank in range(world_size)]
    measured[RESIDUAL] = [
        _most(found.folder, rank, [tags.memory_at_peak_bytes(RESIDUAL)]) for rank in range(world_size)
    ]
    for cause in measured:
        planned.setdefault(cause, [0] * world_size)
    order = [*(cause for cause in planned if cause != TOTAL and _is_anything(planned[cause], measured[cause])), TOTAL]
    return Reconciled(run, {cause: planned[cause] for cause in order}, measured, plan.notes)


def _is_anything(planned: Sequence[int], measured: Sequence[int | None]) -> bool:
    return any(planned) or any(measured)


def _most(folder: RunFolder, rank: int, names: Sequence[str]) -> int | None:
    """The largest of all that a rank logged under these tags."""
    with folder.metrics(rank).open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.endswith("\n")]
    return max((int(line[name]) for line in lines for name in names if name in line), default=None)


def print_reconciled(found: Reconciled) -> None:
    """A row for each cause of each rank; ranks of which all is the same follow each other as one."""
    console, table = empty_table()
    table.add_column("rank", no_wrap=True)
    table.add_column("cause", no_wrap=True)
    for heading in ("planned", "measured", "difference", "%"):
        table.add_column(heading, justify="right", no_wrap=True)
    by_rank = [
        [(cause, planned[rank], found.measured[cause][rank]) for cause, planned in found.planned.items()]
        for rank in range(len(found.planned[TOTAL]))
    ]
    for rows, members in groupby(range(len(by_rank)), key=by_rank.__getitem__):
        first, *others = members
        for number, (cause, planned, measured) in enumerate(rows):
            name = ranks_name(first, first + len(others)) if number == 0 else ""
            table.add_row(name, cause, f"{planned:,}", *_difference(planned, measured))
    print(f"planned and measured bytes of {found.run}\n")
    console.print(table)
    for note in found.notes:
        print(f"  {note}")


def _difference(planned: int, measured: int | None) -> tuple[str, str, str]:
    if measured is None:
        return "not measured", "", ""
    share = f"{100 * (planned - measured) / measured:+.2f}" if measured else ""
    return f"{measured:,}", f"{planned - measured:+,}", share
