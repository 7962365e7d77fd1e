"""What `dist-lowrank compare` writes, of runs that are stored here and of runs made on the spot."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from processes import run_on_ranks
from small_runs import folder_of, overrides_for, run_loop
from stored_comparison import change

from dist_lowrank.cli import main
from dist_lowrank.compare.comparison import compare
from dist_lowrank.compare.plots import plots
from dist_lowrank.compare.traffic import summarize
from dist_lowrank.training.traffic_forecast import TrafficRow

GOLDEN = Path(__file__).parent / "golden_comparison"


def test_two_stored_runs_give_the_stored_files(stored: Path) -> None:
    """After a wanted change: `UPDATE_GOLDEN=1 pytest tests/test_compare.py`, and read the difference."""
    assert main(["compare", "adamw", "dct_adamw", "--out", "first", "--assert", "loss.train <= 1.1 * baseline"]) == 0
    files = {path.name: path for path in (stored / "first").iterdir()}
    drawn = {
        f"{name}.{suffix}"
        for name in ("loss", "memory", "memory_heat_map", "captured_energy")
        for suffix in ("svg", "png")
    }
    assert files.keys() == drawn | {"compare.md", "compare.csv", "compare.json", "compare.html"}
    texts = {name: files[name].read_text() for name in files if name.startswith("compare")}
    page = texts["compare.html"]
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    texts["compare.html"] = re.sub(r"<svg.*?</svg>", "<svg></svg>", page, flags=re.DOTALL)  # matplotlib's business
    for name, text in texts.items():
        if os.environ.get("UPDATE_GOLDEN"):
            GOLDEN.mkdir(exist_ok=True)
            (GOLDEN / name).write_text(text)
        assert text == (GOLDEN / name).read_text(), name

    assert len(drawings) == 4
    for drawing in drawings:
        ElementTree.fromstring(drawing.replace("xlink:href", "href"))
    assert not re.search(r"<script|<link|<img|src=|@import|url\((?!#)", page), "the page needs nothing else"

    for plot in plots(compare(["adamw", "dct_adamw"], with_traffic=False)):
        plot.save(stored / "again.svg")
        assert (stored / "again.svg").read_text() == files[f"{plot.name}.svg"].read_text()


def test_labels_of_runs_by_other_launchers_and_strategies_are_short_and_fit_the_plots(stored: Path) -> None:
    slurm = {"name": "slurm", "nodes": 2, "hosts": "a,b", "work_directory": "/far/away", "flight_recorder_entries": 7}
    other = {"name": "hsdp", "only_there": 2}
    for run in ("slurm", "sharded", "whole"):
        shutil.copytree("adamw", run)
    change(stored / "slurm", launcher=slurm, seed=1)
    for run, sharded in (("sharded", True), ("whole", False)):
        change(
            stored / run,
            launcher=slurm,
            strategy=other | {"reshard_after_forward": sharded},
            precision={"name": "bf16"},
        )
    found = compare(["adamw", "slurm", "sharded", "whole"], allow=["seed"], with_traffic=False)
    assert [group.label for group in found.groups] == [
        "llama_tiny-adamw strategy=fsdp precision=fp32",
        "llama_tiny-adamw strategy=hsdp reshard_after_forward=true precision=bf16",
        "llama_tiny-adamw strategy=hsdp reshard_after_forward=false precision=bf16",
    ]
    assert found.groups[0].seeds == [0, 1], "one group, whatever started them"
    change(stored / "whole", name="a_name_as_long_as_people_give_" * 3)
    change(
        stored / "sharded",
        optimizer={"betas": "0.912345678901234567890123456789"},
        schedule={"name": "as_long_as_it_gets"},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of plots without room for their axes
        long = compare(["adamw", "sharded", "whole", "dct_adamw"], with_traffic=False)
        for plot in plots(long):
            plot.save(stored / f"{plot.name}.svg")
    assert long.groups[1].label == "llama_tiny-adamw (sharded)", "the table of settings tells what differs"


def test_many_ranks_and_hostile_text_are_written_whole(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in ("adamw", "dct_adamw"):
        change(stored / run, data={"path": "<script>$x|y</script>"})
        metrics = stored / run / "attempt-1" / "metrics"
        for rank in range(2, 20):
            text = metrics.joinpath("rank_00001.jsonl").read_text()
            more = re.sub(r'(memory_bytes/gradients": )21816', rf"\g<1>{21816 + (7 * rank) % 19}", text)
            metrics.joinpath(f"rank_{rank:05d}.jsonl").write_text(more)
    change(stored / "dct_adamw", data={"path": "another\x1b[31m"})
    assert main(["compare", "dct_adamw", "adamw", "--out", "out", "--allow", "data", "--no-traffic"]) == 0
    page = (stored / "out" / "compare.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;$x|y&lt;/script&gt;" in page
    printed = capsys.readouterr().out
    assert "another" in printed
    assert "<script>$x|y</script>" in printed, "in a terminal as it is"
    assert "\x1b" not in printed
    markdown = (stored / "out" / "compare.md").read_text()
    assert r"\<script>$x\|y\</script>" in markdown
    row = next(line for line in markdown.splitlines() if line.startswith("| llama_tiny-adamw") and "gradients" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    held = [21816, 21816, *(21816 + (7 * rank) % 19 for rank in range(2, 20))]
    assert cells[3:] == [
        f"{min(held):,}",
        f"{statistics.median(held):,.0f}",
        f"{max(held):,}",
        str(held.index(max(held))),
        f"{sum(held):,}",
    ]


def test_runs_over_seeds_form_a_group_with_mean_and_spread(text: str, tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        overrides = overrides_for(text, tmp_path, "optimizer=galore", "train.global_batch_size=6", "train.steps=2")
        folder = folder_of([*overrides, f"seed={seed}", "optimizer.refresh_interval=2"])
        run_on_ranks(3, run_loop, folder)
        folders.append(folder)
    found = compare([str(folder.path) for folder in folders])
    (group,) = found.groups
    assert group.seeds == [0, 1]
    assert group.world_size == 3
    summaries = [json.loads((folder.path / "FINISHED").read_text())["validation_loss"] for folder in folders]
    loss = found.quantities[0]["loss.validation"]
    assert loss is not None
    assert loss.mean == pytest.approx(statistics.fmean(summaries), rel=1e-12)
    assert loss.spread == pytest.approx(statistics.stdev(summaries), rel=1e-9)
    held = []
    for rank in range(3):
        last = json.loads(folders[0].metrics(rank).read_text().splitlines()[-2])
        causes = {tag: n for tag, n in last.items() if tag.startswith("memory_bytes/")}
        held.append(sum(n for tag, n in causes.items() if not tag.endswith(("parameters", "gradients"))))
    assert len(set(held)) > 1, "an uneven case"
    values = [found.quantities[0][f"state_bytes.{name}"] for name in ("min", "median", "max")]
    assert [value and value.mean for value in values] == [min(held), statistics.median(held), max(held)]
    sent = found.quantities[0]["sent_bytes.refresh"]
    assert sent is not None
    assert sent.mean > 0

    repeated = compare(
        [str(folders[0].path), str(shutil.copytree(folders[0].path, tmp_path / "again"))], with_traffic=False
    )
    assert len(repeated.groups) == 2, "two runs with one seed show whether it repeats"


def test_traffic_is_averaged_over_the_steps_between_refreshes() -> None:
    rows = [
        TrafficRow("refresh", "sums", "all_reduce", 1, 1000),
        TrafficRow("refresh", "exchange", "all_to_all", 1, 400),
        TrafficRow("between refreshes", "exchange", "all_to_all", 1, 400),
        TrafficRow("every 100 steps", "verification", "all_gather", 1, 200),
    ]
    traffic = summarize(rows, 10)
    assert (traffic.mean_bytes, traffic.refresh_bytes, traffic.other_bytes) == (100 + 400 + 2, 1400, 400)
    assert summarize(rows, 10, staggered=True).mean_bytes is None
