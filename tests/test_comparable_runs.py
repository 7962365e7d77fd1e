"""Which runs `dist-lowrank compare` sets beside each other: of other settings, unfinished, evaluated elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from stored_comparison import change

from dist_lowrank.cli import main
from dist_lowrank.compare.comparison import compare
from dist_lowrank.compare.runs import read_run
from dist_lowrank.config import ConfigError


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
