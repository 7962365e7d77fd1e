"""What TensorBoard itself says of runs of several ranks: its server, and its pages in a browser."""

from __future__ import annotations

import gzip
import io
import json
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401 (imported before the fork, so that the ranks need not)
from collectives import CountCollectives
from PIL import Image
from processes import run_on_ranks
from small_runs import assert_events_equal_lines, folder_of, overrides_for
from tensorboard_pages import Server, browse, find_browser, serve

from dist_lowrank.config import RunFolder
from dist_lowrank.config.schema import TelemetryConfig
from dist_lowrank.telemetry import tags
from dist_lowrank.telemetry.causes import is_state
from dist_lowrank.telemetry.dashboard import Dashboard
from dist_lowrank.telemetry.heat_map import heat_map
from dist_lowrank.telemetry.metrics import MetricsWriter
from dist_lowrank.telemetry.over_ranks import FIGURES
from dist_lowrank.training.run import train

RUNS = {  # ranks, and what is said of the run
    "low_rank": (2, ("optimizer=dct_adamw", "telemetry.profile_steps=[1,1]")),
    "dense": (2, ("optimizer=adamw",)),
    "many": (3, ("optimizer=dct_adamw", "telemetry.max_ranks_shown=2", "telemetry.heat_map_interval=2")),
}
STEPS = 4


def _train(rank: int, folder: RunFolder) -> int:
    return train(folder.config(), folder, torch.device("cpu"))


@pytest.fixture(scope="module")
def runs(text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    root = tmp_path_factory.mktemp("runs")
    folders = {}
    for name, (ranks, more) in RUNS.items():
        common = ["telemetry.tensorboard=true", f"train.steps={STEPS}", "train.global_batch_size=12"]
        folder = folders[name] = folder_of(overrides_for(text, root, f"name={name}", *common, *more))
        if name == "low_rank":
            folder.trace_demand.touch()
        assert set(run_on_ranks(ranks, _train, folder)) == {0}
    return folders


@pytest.fixture(scope="module")
def server(runs: dict[str, RunFolder]) -> Iterator[Server]:
    with serve(runs["dense"].path.parent) as server:
        deadline = time.monotonic() + 60
        while len(server.get("scalars/tags")) < 5 + len(RUNS):  # rank_00000, ... and final
            assert time.monotonic() < deadline, server.get("scalars/tags")
            time.sleep(0.2)
        yield server


def _run(folder: RunFolder, of: str) -> str:
    """TensorBoard's name of one folder of event files."""
    return f"{folder.path.name}/attempt-1/tensorboard/{of}"


def _curves(server: Server, folder: RunFolder, category: str, title: str) -> dict[str, dict[str, list[float]]]:
    """What a chart of the custom-scalars tab draws: by rank's folder and by tag, the values."""
    (charts,) = [c["chart"] for c in server.get("custom_scalars/layout")["category"] if c["title"].startswith(category)]
    (patterns,) = [chart["multiline"]["tag"] for chart in charts if chart["title"] == title]
    found: dict[str, dict[str, list[float]]] = {}
    for run in (run for run in server.get("scalars/tags") if run.startswith(folder.path.name + "/")):
        for pattern in patterns:
            answer = server.get("custom_scalars/scalars", run=run, tag=pattern)
            assert answer["regex_valid"]
            for tag, events in answer["tag_to_events"].items():
                found.setdefault(run.rpartition("/")[2], {})[tag] = [value for _, _, value in events]
    return found


def _lines(folder: RunFolder, rank: int) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in folder.metrics(rank).read_text().splitlines()]
    return [line for line in lines if tags.LOSS_TRAIN in line]


def test_one_chart_has_all_ranks_of_a_cause_and_another_all_causes_of_a_rank(
    runs: dict[str, RunFolder], server: Server
) -> None:
    folder = runs["low_rank"]
    for cause in ("parameters", "gradients", "moments", "dense_moments", "indices", "dictionary"):
        tag = tags.memory_bytes(cause)
        assert _curves(server, folder, "Memory by cause", cause) == {
            f"rank_{rank:05d}": {tag: [line[tag] for line in _lines(folder, rank)]} for rank in (0, 1)
        }
    for rank in (0, 1):
        expected = {}
        for tag in _lines(folder, rank)[0]:
            of_tag = [line[tag] for line in _lines(folder, rank)]
            if tag.startswith("memory_bytes/") and any(of_tag):  # a curve begins where there is something
                begins = next(step for step, number in enumerate(of_tag) if number)
                expected[tag.replace("memory_bytes/", f"memory_of_rank/{rank:05d}/")] = of_tag[begins:]
        assert len(expected) >= 6
        assert _curves(server, folder, "Memory by rank", f"rank {rank}") == {f"rank_{rank:05d}": expected}


def test_there_are_charts_of_loss_speed_and_captured_energy(runs: dict[str, RunFolder], server: Server) -> None:
    folder = runs["low_rank"]
    for category, title in (
        ("Loss", "training"),
        ("Loss", "validation"),
        ("Throughput", "tokens per second"),
        ("Optimizer", "milliseconds per step"),
        ("Captured energy", "q_proj"),
    ):
        curves = _curves(server, folder, category, title)
        assert curves.keys() == {"rank_00000", "rank_00001"}, title
        assert all(len(tags) == 1 for tags in curves.values()), title
    assert len(_curves(server, folder, "Captured energy", "all families")["rank_00001"]) == 7


def test_runs_sort_and_filter_in_the_hparams_tab(runs: dict[str, RunFolder], server: Server) -> None:
    def listed(*columns: dict[str, Any]) -> list[dict[str, Any]]:
        request = {
            "experimentName": "",
            "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN"],
            "colParams": list(columns),
            "startIndex": 0,
            "sliceSize": 100,
        }
        groups: list[dict[str, Any]] = server.post("hparams/session_groups", request)["sessionGroups"]
        return groups

    by_bytes = listed({"metric": {"tag": "final/state_bytes"}, "order": "ORDER_DESC"})
    assert [group["hparams"]["optimizer.name"] for group in by_bytes] == ["adamw", "dct_adamw", "dct_adamw"]
    assert len(listed({"hparam": "optimizer.name", "filterDiscrete": ["dct_adamw"]})) == 2
    (one,) = listed({"hparam": "processes", "filterInterval": {"minValue": 3, "maxValue": 9}})
    assert one["hparams"]["optimizer.rank"] == runs["many"].config().optimizer.rank  # AdamW has none
    for group in by_bytes:
        metrics = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
        (folder,) = [folder for folder in runs.values() if folder.path.name == group["name"].partition("/")[0]]
        summary = json.loads((folder.path / "FINISHED").read_text())
        names = ("validation_loss", "state_bytes", "total_bytes", "tokens_per_second")
        assert metrics == pytest.approx({f"final/{name}": summary[name] for name in names}, rel=1e-6)
        ranks = range(int(group["hparams"]["processes"]))
        held = [
            sum(n for tag, n in line.items() if tag.startswith("memory_bytes/") and is_state(tag.partition("/")[2]))
            for rank in ranks
            for line in _lines(folder, rank)
        ]
        assert summary["state_bytes"] == max(held)


def test_the_text_tab_has_the_parameter_table_and_the_configuration(runs: dict[str, RunFolder], server: Server) -> None:
    run = _run(runs["low_rank"], "rank_00000")
    (table,) = server.get("text/text", run=run, tag="run/parameters/text_summary")
    row = re.search(r"<tr>\s*<td[^>]*><code>model.layers.0.mlp.down_proj.weight</code>.*?</tr>", table["text"], re.S)
    assert row
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row[0])
    assert cells[1:7] == ["12 x 28", "low-rank", "left", "12", "3", "Shard(1)"]
    (configuration,) = server.get("text/text", run=run, tag="run/configuration/text_summary")
    assert "column_bias_correction" in configuration["text"]


def test_with_many_ranks_one_writes_statistics_over_all_and_a_heat_map(
    runs: dict[str, RunFolder], server: Server
) -> None:
    folder = runs["many"]
    assert sorted(path.name for path in folder.tensorboard(0).parent.iterdir()) == ["final", "rank_00000"]
    for cause in ("moments", "dense_moments", "parameters"):
        tag = tags.memory_bytes(cause)
        found = _curves(server, folder, "Over ranks: min", cause)["rank_00000"]
        worst = _curves(server, folder, "Over ranks: the number", cause)["rank_00000"]
        by_rank = [[line[tag] for line in _lines(folder, rank)] for rank in range(3)]
        for step, figures in enumerate(zip(*by_rank, strict=True)):
            assert found[tags.over_ranks(tag, "min")][step] == min(figures)
            assert found[tags.over_ranks(tag, "median")][step] == statistics.median(figures)
            assert found[tags.over_ranks(tag, "max")][step] == max(figures)
            assert figures[int(worst[tags.over_ranks(tag, "worst_rank")][step])] == max(figures)
    run, tag = _run(folder, "rank_00000"), "memory_by_rank_and_cause"
    assert server.get("images/tags")[run].keys() == {tag}
    images = server.get("images/images", run=run, tag=tag, sample=0)
    assert [image["step"] for image in images] == [1, 3]
    picture = Image.open(io.BytesIO(server.get_bytes(f"images/individualImage?{images[-1]['query']}")))
    held = [tag for tag, number in _lines(folder, 0)[-1].items() if tag.startswith("memory_bytes/") and number]
    assert picture.size == heat_map({cause: [1.0] * 3 for cause in held}, "").shape[1::-1]


def test_event_files_equal_the_json_lines_of_all_runs(runs: dict[str, RunFolder]) -> None:
    for name, folder in runs.items():
        for rank in (0, 1) if name != "many" else (0,):
            assert_events_equal_lines(folder, rank)


def test_profiles_that_were_asked_for_have_the_optimizer_and_the_collectives_of_each_rank(
    runs: dict[str, RunFolder],
) -> None:
    """One by the configuration, one by a file that was there when the run began, and after which the next steps are."""
    folder = runs["low_rank"]
    assert sorted(path.name for path in folder.traces.iterdir()) == ["steps_1_to_1", "steps_2_to_4"]
    for steps, made in (("steps_1_to_1", 1), ("steps_2_to_4", 3)):
        for rank in (0, 1):
            with gzip.open(folder.traces / steps / f"rank{rank}_trace.json.gz") as file:
                names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
            assert names.count("Optimizer.step#DCTAdamW.step") == made
            assert "gloo:all_reduce" in names
            assert any("allgather" in name or "all_gather" in name for name in names)
    assert not folder.trace_demand.exists()


def _collectives_of_an_entry(rank: int, folder: Path, max_ranks_shown: int) -> list[tuple[str, int]]:
    settings = TelemetryConfig(max_ranks_shown=max_ranks_shown)
    with MetricsWriter(folder / f"{rank}.jsonl", None) as metrics, CountCollectives() as counter:
        dashboard = Dashboard(settings, metrics, torch.device("cpu"))
        dashboard.log(1, {tags.memory_bytes("moments"): 100} if rank == 0 else {})
        with pytest.raises(ValueError, match="'secrets': has no place; allowed: parameters"):
            Dashboard(TelemetryConfig(max_ranks_shown=1), metrics, torch.device("cpu")).log(
                1, {"memory_bytes/secrets": 1}
            )
    return counter.calls


def test_an_entry_sends_nothing_with_few_ranks_and_one_small_all_gather_with_many(tmp_path: Path) -> None:
    assert run_on_ranks(2, _collectives_of_an_entry, tmp_path, 2) == [[], []]
    for calls in run_on_ranks(2, _collectives_of_an_entry, tmp_path, 1):
        ((name, numbers),) = calls
        assert "allgather" in name
        assert numbers in (len(FIGURES), 2 * len(FIGURES))
    assert (
        json.loads((tmp_path / "0.jsonl").read_text().splitlines()[-1])["over_ranks/memory_bytes/moments/median"] == 50
    )


@pytest.mark.parametrize(("ranks", "rows"), [(1, 1), (24, 24), (65, 33), (16384, 64)])
def test_a_heat_map_has_a_dark_cell_where_the_most_is_whatever_the_ranks(ranks: int, rows: int) -> None:
    worst = ranks // 2
    moments = [1000.0 + 1000.0 * (rank == worst) for rank in range(ranks)]
    picture = heat_map({"moments": moments, "indices": [0.0] * ranks}, "title").astype(int)
    assert len(picture) - len(heat_map({}, "title")) == 20 * rows
    per_row = -(-ranks // rows)
    cells = picture[-8 - 20 * rows + 2 : -8 : 20, 8 + 110 + 2]  # a corner of each cell of the first column
    assert cells.sum(axis=1).argmin() == worst // per_row
    assert heat_map({"indices": [0.0]}, "t" * 60).shape[1] == heat_map({}, "t" * 60).shape[1]  # no column for nothing


@pytest.mark.slow
@pytest.mark.timeout(900)  # a browser on busy cores takes minutes
def test_a_browser_shows_the_charts_of_each_rank(runs: dict[str, RunFolder], server: Server) -> None:
    browser = find_browser()
    if browser is None:
        pytest.skip("needs a browser of Chromium's family: `make browser` installs one")
    name = runs["low_rank"].path.name
    with browse(browser) as page:
        page.set_default_timeout(250_000)
        page.goto(f"{server.url}/#custom_scalars")
        cards = page.locator("tf-custom-scalar-multi-line-chart-card")
        for title, curves in (
            ("moments", [(tags.memory_bytes("moments"), rank) for rank in (0, 1)]),
            ("rank 1", [(tags.memory_of_rank(1, cause), 1) for cause in ("parameters", "moments", "indices")]),
        ):
            card = cards.filter(has=page.get_by_text(title, exact=True)).first
            card.locator(".toggle-matches-button").click()
            for tag, rank in curves:
                card.get_by_text(f"{tag} ({name}/attempt-1/tensorboard/rank_{rank:05d})").wait_for()
            drawn = [path.get_attribute("d") for path in card.locator("svg path.line").all()]
            assert len([line for line in drawn if line]) >= len(curves)
