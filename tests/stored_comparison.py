"""Changes to the runs of `stored_runs`, in the copy that the fixture `stored` makes."""

from __future__ import annotations

import json
from pathlib import Path


def change(path: Path, **sections: dict[str, object]) -> None:
    """Changes the stored configuration of a run."""
    file = path / "attempt-1" / "run.json"
    record = json.loads(file.read_text())
    for name, values in sections.items():
        record["config"][name] = record["config"][name] | values if isinstance(values, dict) else values
    file.write_text(json.dumps(record))
