"""Metrics: event files and JSON lines hold the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_lowrank.telemetry import tags
from dist_lowrank.telemetry.metrics import MetricsWriter


def read_lines(path: Path) -> list[dict[str, object]]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def test_event_files_and_json_lines_hold_the_same(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics" / "rank_0.jsonl", tmp_path / "tensorboard" / "rank_0") as writer:
        for step in range(1, 6):
            values: dict[str, float] = {
                tags.LOSS_TRAIN: 6.0 - step / 7,
                tags.LEARNING_RATE: 1e-3 / step,
                tags.captured_energy("attention.q_proj"): 0.25,
                tags.memory_bytes("parameters"): 29_450_240 + step,
            }
            if step == 5:
                values[tags.LOSS_VALIDATION] = np.float32(5.5)
            writer.log(step, values)

    lines = read_lines(tmp_path / "metrics" / "rank_0.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0][tags.LOSS_TRAIN] == 6.0 - 1 / 7  # full precision
    assert lines[0]["memory_bytes/parameters"] == 29_450_241
    from_lines = {
        (tag, line["step"], line["time"], float(np.float32(value)))
        for line in lines
        for tag, value in line.items()
        if tag not in ("step", "time")
    }
    events = read_events(tmp_path / "tensorboard" / "rank_0")
    from_events = {
        (tag, event.step, event.wall_time, event.value)
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    assert len(from_events) == 21
    assert from_events == from_lines


def test_entries_are_on_disk_before_the_writer_is_closed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "rank_0.jsonl", tmp_path / "tensorboard")
    writer.log(1, {tags.LOSS_TRAIN: 2.0})
    assert read_lines(tmp_path / "rank_0.jsonl")[0][tags.LOSS_TRAIN] == 2.0
    assert [event.value for event in read_events(tmp_path / "tensorboard").Scalars(tags.LOSS_TRAIN)] == [2.0]
    writer.close()


def test_values_that_are_not_finite_stay_valid_json_and_read_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "rank_0.jsonl", tmp_path / "tensorboard") as writer:
        writer.log(1, {"a": float("nan"), "b": float("inf"), "c": -float("inf")})
    (line,) = read_lines(tmp_path / "rank_0.jsonl")
    assert (line["a"], line["b"], line["c"]) == ("NaN", "Infinity", "-Infinity")
    events = read_events(tmp_path / "tensorboard")
    for tag in "abc":
        np.testing.assert_equal(events.Scalars(tag)[0].value, float(str(line[tag])))


def test_a_restarted_run_continues_its_json_lines(tmp_path: Path) -> None:
    for step in (1, 2):
        with MetricsWriter(tmp_path / "rank_0.jsonl", None) as writer:
            writer.log(step, {"loss/train": 1.0})
            writer.text("configuration", "no TensorBoard, no effect")
    assert [line["step"] for line in read_lines(tmp_path / "rank_0.jsonl")] == [1, 2]
    assert list(tmp_path.iterdir()) == [tmp_path / "rank_0.jsonl"]


def test_text_is_shown_in_tensorboard(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "rank_0.jsonl", tmp_path / "tensorboard") as writer:
        writer.text("configuration", "steps: 120")
    (event,) = read_events(tmp_path / "tensorboard").Tensors("configuration/text_summary")
    assert event.tensor_proto.string_val == [b"steps: 120"]


@pytest.mark.parametrize("tag", ["step", "time", "", "loss train", "/loss", "loss/", "loss[0]"])
def test_tags_that_the_two_files_would_name_differently_are_refused(tmp_path: Path, tag: str) -> None:
    with MetricsWriter(tmp_path / "rank_0.jsonl", None) as writer, pytest.raises(ValueError, match="metric tag"):
        writer.log(1, {tag: 1.0})
    assert read_lines(tmp_path / "rank_0.jsonl") == []


def test_closing_twice_is_fine_and_logging_afterwards_is_an_error(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "rank_0.jsonl", tmp_path / "tensorboard")
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.log(1, {"loss/train": 1.0})


def test_the_page_names_every_tag_that_a_run_logs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "tensorboard.md").read_text()
    logged = {name: tag for name, tag in vars(tags).items() if name.isupper() and isinstance(tag, str)}
    logged |= {"energy": tags.captured_energy("FAMILY"), "memory": tags.memory_bytes("CAUSE")}
    logged |= {"peak": tags.memory_at_peak_bytes("CAUSE"), "of rank": tags.memory_of_rank(0, "CAUSE")}
    assert [tag for tag in logged.values() if f"`{tag}`" not in page] == []
