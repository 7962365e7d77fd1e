"""The table of all optimizers: whom it has, that their runs can start, and what it reads out of a run."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from processes import run_on_ranks
from small_runs import folder_of, overrides_for, run_loop

from dist_lowrank.config import compose
from dist_lowrank.config.compose import config_directory, group_options

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "optimizers.py"


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARK))


def test_every_optimizer_of_the_command_line_has_a_line(table: dict[str, Any]) -> None:
    """But for the variants with published settings."""
    chosen = {overrides[0].partition("=")[2] for overrides in table["CONTENDERS"].values()}
    optimizers = group_options(config_directory())["optimizer"]
    assert chosen == {name for name in optimizers if not name.endswith("_published")}


@pytest.mark.slow
def test_every_line_is_a_run_that_can_start(table: dict[str, Any]) -> None:
    for name, overrides in table["CONTENDERS"].items():
        config = compose([*overrides, *table["SETTINGS"], "train.steps=100"])
        assert name.startswith(config.optimizer.name)


def test_a_line_shows_what_the_run_has_written(table: dict[str, Any], text: str, tmp_path: Path) -> None:
    folder = folder_of(overrides_for(text, tmp_path, "train.steps=3", "optimizer=galore"))
    results = run_on_ranks(2, run_loop, folder)
    read = table["read"]("galore", ("optimizer=galore",), folder.path)
    validation = [entry["loss/validation"] for entry in results[0]["entries"] if "loss/validation" in entry]
    assert (read.first_loss, read.loss) == (validation[0], validation[-1])
    held = []
    for result in results:
        last = [entry for entry in result["entries"] if "memory_bytes/parameters" in entry][-1]
        causes = ("moments", "dense_moments", "projection", "other_state", "diagnostics")
        held.append(sum(last.get(f"memory_bytes/{cause}", 0) for cause in causes))
    assert read.state_bytes == max(held) > 0
    assert 0 < read.optimizer_milliseconds < read.step_milliseconds

    rendered = table["render"]([dataclasses.replace(read, loss=read.loss + 1), read], steps=3)
    first, second = (line for line in rendered.splitlines() if line.startswith("| galore"))
    assert f"{read.loss:.3f}" in first
    assert f"{read.loss + 1:.3f}" in second
    document = f"before\n{table['BEGIN']}\nold\n{table['END']}\nafter\n"
    assert table["with_table"](document, rendered).split(rendered) == [
        f"before\n{table['BEGIN']}\n\n",
        f"\n\n{table['END']}\nafter\n",
    ]
    assert json.loads((folder.path / "FINISHED").read_text())["steps"] == 3


def test_who_stays_behind_adamw_is_named(table: dict[str, Any]) -> None:
    def result(name: str, loss: float) -> Any:
        return table["Result"](name, (), 8.0, loss, 1, 1.0, 1.0)

    assert table["behind"]([result("adamw", 6.0), result("near", 6.4), result("better", 5.0)]) == []
    assert table["behind"]([result("adamw", 6.0), result("late", 6.6), result("lost", float("nan"))]) == [
        "late",
        "lost",
    ]
    assert table["behind"]([result("alone", 7.9)]) == []
