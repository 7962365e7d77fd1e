"""`dist-lowrank compare` on runs that are stored here, and on runs made on the spot."""

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

from dist_lowrank.cli import main
from dist_lowrank.compare.assertions import evaluate, parse
from dist_lowrank.compare.comparison import compare
from dist_lowrank.compare.plots import plots
from dist_lowrank.compare.runs import read_run
from dist_lowrank.compare.traffic import summarize
from dist_lowrank.config import ConfigError
from dist_lowrank.training.traffic_forecast import TrafficRow

# Two runs of this package, 12 steps in 2 processes, made with the commands in their provenance.json.
STORED = Path(__file__).parent / "stored_runs"
GOLDEN = Path(__file__).parent / "golden_comparison"


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stored runs, as working directory."""
    shutil.copytree(STORED, tmp_path / "stored")
    monkeypatch.chdir(tmp_path / "stored")
    return tmp_path / "stored"


def change(path: Path, **sections: dict[str, object]) -> None:
    """Changes the stored configuration of a run."""
    file = path / "attempt-1" / "run.json"
    record = json.loads(file.read_text())
    for name, values in sections.items():
        record["config"][name] = record["config"][name] | values if isinstance(values, dict) else values
    file.write_text(json.dumps(record))


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


def test_an_assertion_that_does_not_hold_ends_with_code_3_and_says_why(
    stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "adamw", "dct_adamw", "--no-traffic", "--assert"]
    assert main([*command, "state_bytes.max <= 0.8 * baseline"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*command, "state_bytes.max <= 0.35 * baseline", "--assert", "loss.validation < 6"]) == 3
    assert capsys.readouterr().err == (
        "error: does not hold for llama_tiny-dct_adamw: state_bytes.max <= 0.35 * baseline "
        "(state_bytes.max = 34,830, baseline.state_bytes.max = 43,716)\n"
    )


VALUES = {"state_bytes.max": 40.0, "state_bytes.min": 30.0, "loss.validation": 5.0, "captured_energy": None}
BASELINE = {"state_bytes.max": 100.0, "state_bytes.min": 90.0, "loss.validation": 4.5, "captured_energy": None}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("state_bytes.max <= 0.4 * baseline", True),
        ("state_bytes.max < 0.4 * baseline", False),
        ("state_bytes.max == baseline - 60 and state_bytes.min != baseline", True),
        ("abs(loss.validation - baseline.loss.validation) <= 0.5", True),
        ("abs(-loss.validation / 2) > 2.5 or not loss.validation > 5", True),
        ("20 < state_bytes.min < state_bytes.max < 40", False),
        ("state_bytes.max / baseline.state_bytes.min >= (1 + 1) * 0.2", True),
    ],
)
def test_assertions_mean_what_they_say(text: str, holds: bool) -> None:
    assert evaluate(parse(text), "run", VALUES, BASELINE).holds is holds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('true') < 1", "__import__('os').system('true') is not allowed; allowed: numbers, "),
        ("(1).__class__ == 1", "1 .__class__ is not allowed; allowed: numbers, "),
        ("[x for x in (1,)] == 1", "is not allowed"),
        ("(lambda: 1)() == 1", "is not allowed"),
        ("2 ** 999999999 > 1", "2 ** 999999999 is not allowed"),
        ("loss.validation < '5'", "'5' is not allowed"),
        ("loss.validation < True", "True is not allowed"),
        ("loss.validation in (1, 2)", "is no comparison"),
        ("state_bytes.max", "state_bytes.max is no comparison; allowed: numbers, "),
        ("state_bytes.max =< 3", "is no expression"),
        ("(" * 500, "is no expression"),
        ("baseline < 3", "baseline has no meaning where a comparison names several quantities or none; allowed: "),
        ("state_bytes.max - state_bytes.min < baseline", "several quantities or none; allowed: baseline.QUANTITY"),
        (
            "state_byte.max < 1",
            "state_byte.max; did you mean state_bytes.max or state_bytes.min? allowed: one of the 4",
        ),
        ("state_bytes < 1", "no quantity is called state_bytes; did you mean state_bytes.max or state_bytes.min? "),
        ("baseline.los < 1", "no quantity is called los; "),
        ("captured_energy > 0.3", "run has no captured_energy (`-` in the tables); allowed: one of the 3 quantities "),
        ("loss.validation < 1 / 0", "divides by 0, which is 0"),
    ],
)
def test_what_is_no_assertion_is_refused_and_never_executed(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        evaluate(parse(text), "run", VALUES, BASELINE)
    assert str(caught.value).startswith(f"--assert {text}: ")


@pytest.mark.parametrize(
    ("sections", "message", "allow"),
    [
        (
            {"data": {"sequence_length": 32}},
            "error: data.sequence_length: 16 in llama_tiny-adamw, 32 in llama_tiny-dct_adamw; allowed: equal ones, "
            "or --allow data\n",
            "data",
        ),
        ({"seed": 1}, "error: seed: 0 in llama_tiny-adamw, 1 in llama_tiny-dct_adamw; allowed: equal ones, ", "seed"),
        (
            {"model": {"config": {"num_hidden_layers": 3}}},
            "error: model.config.num_hidden_layers: 2 in ",
            "model,data",
        ),
    ],
)
def test_other_data_another_seed_and_another_model_are_refused_unless_told(
    sections: dict[str, dict[str, object]],
    message: str,
    allow: str,
    stored: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "model" in sections:
        record = json.loads((stored / "adamw" / "attempt-1" / "run.json").read_text())
        sections["model"]["config"] = record["config"]["model"]["config"] | sections["model"]["config"]  # type: ignore[operator]
    change(stored / "dct_adamw", **sections)
    assert main(["compare", "adamw", "dct_adamw", "--no-traffic"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.out == ""
    assert main(["compare", "adamw", "dct_adamw", "--no-traffic", "--allow", allow]) == 0
    assert "\n- Not the same for all: " in capsys.readouterr().out


def test_other_refusals_name_what_is_allowed(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main(["compare", "--no-traffic", *arguments]) == 2
        return capsys.readouterr().err

    assert refused("nowhere").startswith("error: nowhere: no run is there; allowed: a folder of a run")
    assert refused("adamw", "--allow", "dta") == (
        "error: --allow: dta is not allowed; did you mean data? allowed: data, seed, model, evaluation\n"
    )
    assert refused("adamw", "--out", "adamw/FINISHED").startswith("error: --out adamw/FINISHED: cannot be written (")
    metrics = stored / "adamw" / "attempt-1" / "metrics"
    metrics.joinpath("rank_00001.jsonl").rename(metrics / "rank_00002.jsonl")
    assert refused("adamw") == (
        "error: adamw/attempt-1/metrics/rank_00001.jsonl: is missing; "
        "allowed: a folder with the metrics of every rank\n"
    )
    metrics.joinpath("rank_00000.jsonl").write_text('{"step": 1}\nnot JSON\n')
    assert "rank_00000.jsonl: line 2 is not JSON; allowed: " in refused("adamw")
    metrics.joinpath("rank_00000.jsonl").write_text('{"step": 0, "time": 1.0, "loss/validation": 5.0}\n')
    assert refused("adamw").startswith("error: adamw: the run has logged no step; allowed: runs with at least one")


def test_an_unfinished_run_is_compared_as_far_as_it_came(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stored / "dct_adamw" / "FINISHED").unlink()
    for rank in (0, 1):
        file = stored / "dct_adamw" / "attempt-1" / "metrics" / f"rank_{rank:05d}.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:12]) + lines[12][:50])  # killed while it wrote the entry of step 10
    found = compare(["adamw", "dct_adamw"], with_traffic=False)
    assert list(found.notes) == ["Unfinished: dct_adamw, 9 of 12 steps."]
    assert [row.tokens for row in found.loss] == [512, 1024], "the evaluations that both have"
    assert found.loss[-1].validation[1].mean == found.groups[1].first.curve("loss/validation")[-1][2]
    assert main(["compare", "adamw", "dct_adamw", "--no-traffic"]) == 0
    assert "9 of 12, unfinished" in capsys.readouterr().out


def test_attempts_of_one_run_make_one_curve(stored: Path) -> None:
    whole = read_run("adamw")
    first, second = stored / "adamw" / "attempt-1", stored / "adamw" / "attempt-2"
    shutil.copytree(first, second)
    for rank in (0, 1):
        name = f"metrics/rank_{rank:05d}.jsonl"
        lines = (first / name).read_text().splitlines(keepends=True)
        (first / name).write_text("".join(lines[:10]))  # killed after step 8, which is after the last checkpoint
        (second / name).write_text("".join(lines[7:]))  # from step 6 on
    (stored / "adamw" / "FINISHED").write_text('{"attempt": 2}')
    continued = read_run("adamw")
    assert continued.entries == whole.entries
    assert continued.folder.attempt == 2
    assert continued.is_finished
    shutil.copytree(first, stored / "adamw" / "attempt-3")
    assert read_run("adamw/attempt-1").entries == read_run("adamw").entries[:10], "attempt-3 began anew"


def test_losses_are_compared_where_all_were_evaluated_or_else_marked_as_interpolated(
    stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(stored / "dct_adamw", train={"global_batch_size": 4})  # whose evaluations then lie at 256, 512, 768 tokens
    change(stored / "adamw", train={"global_batch_size": 6})  # at 384, 768, 1152
    losses = [value for *_, value in read_run("dct_adamw").curve("loss/validation")]
    common = compare(["adamw", "dct_adamw"], with_traffic=False)
    assert [row.tokens for row in common.loss] == [768]
    assert common.loss[0].validation[1].mean == losses[3]
    assert not common.notes

    change(stored / "adamw", train={"global_batch_size": 5})  # at 320, 640, 960
    found = compare(["adamw", "dct_adamw"], with_traffic=False)
    assert [row.tokens for row in found.loss] == [320, 640]
    value = found.loss[1].validation[1]
    assert value.mean == pytest.approx((losses[2] + losses[3]) / 2, rel=1e-12)
    assert [each.interpolated for each in found.loss[1].validation] == [False, True]
    (note,) = found.notes
    assert note.startswith("Not evaluated at the same numbers of tokens: validation losses of llama_tiny-dct_adamw ")
    assert main(["compare", "adamw", "dct_adamw", "--no-traffic", "--assert", "loss.validation < 5"]) == 3
    printed = capsys.readouterr()
    assert re.search(rf"~{value.mean:.4f} +~[+-]", printed.out), "in the summary, and the difference too"
    assert f"(loss.validation = ~{value.mean:.10g})" in printed.err


def test_runs_that_measured_in_another_way_are_refused_or_noted(
    stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(stored / "dct_adamw", train={"eval_sequences": 5})
    assert main(["compare", "adamw", "dct_adamw", "--no-traffic"]) == 2
    assert capsys.readouterr().err == (
        "error: train.eval_sequences: 10 in llama_tiny-adamw, 5 in llama_tiny-dct_adamw; allowed: equal ones, "
        "or --allow evaluation\n"
    )
    found = compare(["adamw", "dct_adamw"], allow=["evaluation"], with_traffic=False)
    assert found.notes[0].startswith("Not the same for all: train.eval_sequences: 10 in llama_tiny-adamw, 5 in ")

    for run in ("adamw", "dct_adamw"):
        change(stored / run, train={"eval_sequences": 10, "eval_legacy_counter": True})
    assert not compare(["adamw", "dct_adamw"], with_traffic=False).notes
    metrics = stored / "dct_adamw" / "attempt-1" / "metrics"
    for rank in (2, 3):  # which logged a cause that the other run did not
        text = (metrics / "rank_00001.jsonl").read_text()
        in_step = {"memory_bytes/activations": 40_000 + rank, "memory_bytes/temporaries": 90_000}
        peak = {"parameters": 21_816, "activations": 40_000 + rank, "temporaries": 50, "residual": -7}
        at_peak = {f"memory_at_peak_bytes/{cause}": n for cause, n in (peak | {"total": sum(peak.values())}).items()}
        tracked = json.dumps({"step": 2, "time": 0.0} | in_step | at_peak)
        (metrics / f"rank_{rank:05d}.jsonl").write_text(f"{text}{tracked}\n")
    with pytest.raises(ConfigError, match=r"^ranks: 2 in llama_tiny-adamw, 4 in llama_tiny-dct_adamw; allowed: "):
        compare(["adamw", "dct_adamw"], with_traffic=False)
    for run in ("adamw", "dct_adamw"):
        change(stored / run, train={"eval_legacy_counter": False})
    assert main(["compare", "adamw", "dct_adamw", "--no-traffic", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert "- Not the same number of ranks for all (2, 4): bytes per rank, times and bytes sent are not like" in printed
    assert "- Not logged by all: memory of activations, temporaries." in printed
    rows = [line.split()[1:] for line in printed.splitlines() if line.startswith("llama_tiny-dct_adamw ")]
    assert ["activations", "in", "a", "step", "0", "20,001", "40,003", "3", "80,005"] in rows
    assert ["all", "memory", "sum", "78,462", "78,462", "78,462", "-", "313,848"] in rows, "no sum of several moments"
    peaks = {
        name: found.mean if (found := quantity["peak_bytes.max"]) else None
        for name, quantity in zip(
            ("adamw", "dct_adamw"), compare(["adamw", "dct_adamw"], with_traffic=False).quantities, strict=True
        )
    }
    assert peaks == {"adamw": None, "dct_adamw": 61_862}, "the total of the table, not mixed with `total_bytes`"
    assert ["residual", "-7", "-4", "0", "0", "-14"] in rows
    assert ["total", "0", "30,930", "61,862", "3", "123,723"] in rows
    assert (stored / "out" / "memory_at_peak.svg").exists()


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
