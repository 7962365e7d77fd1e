"""A comparison as files: Markdown, CSV, JSON, one HTML page, and plots."""

from __future__ import annotations

import json
from pathlib import Path

from dist_lowrank.compare.comparison import Comparison
from dist_lowrank.compare.data import as_data, csv_text
from dist_lowrank.compare.markdown import markdown
from dist_lowrank.compare.page import page
from dist_lowrank.config import ConfigError
from dist_lowrank.config.run_folder import write_atomically


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes `compare.md`, `.csv`, `.json`, `.html` and each plot as `.svg` and `.png`; returns the paths.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    from dist_lowrank.compare.plots import plots  # needs matplotlib

    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures: dict[str, str] = {}
        paths = []
        for plot in plots(comparison):
            for suffix in ("svg", "png"):
                paths.append(folder / f"{plot.name}.{suffix}")
                plot.save(paths[-1])
            pictures[plot.title] = (folder / f"{plot.name}.svg").read_text(encoding="utf-8")
        texts = {
            "compare.md": markdown(comparison),
            "compare.csv": csv_text(comparison),
            "compare.json": json.dumps(as_data(comparison), indent=1, allow_nan=False, ensure_ascii=False) + "\n",
            "compare.html": page(comparison, pictures),
        }
        for name, text in texts.items():
            write_atomically(folder / name, text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"--out {folder}: cannot be written ({reason}); allowed: a folder to write in") from error
    return [folder / name for name in texts] + paths
