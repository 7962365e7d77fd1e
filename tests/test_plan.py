"""`dist-lowrank plan`: what it prints, its exit code, and how near it comes to a run."""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collectives import CountCollectives
from processes import run_on_ranks
from small_runs import TINY, folder_of, overrides_for, run_loop, write_text

from dist_lowrank.cli import main
from dist_lowrank.config import RunConfig, compose
from dist_lowrank.planning import verb
from dist_lowrank.planning.devices import capacity_bytes
from dist_lowrank.planning.estimate import estimate_step
from dist_lowrank.planning.fit import largest_micro_batch, largest_rank
from dist_lowrank.planning.plan import Planner
from dist_lowrank.planning.reconcile import TOTAL, reconcile
from dist_lowrank.planning.report import columns
from dist_lowrank.planning.trace import trace, with_blocks
from dist_lowrank.planning.traffic import strategy_traffic
from dist_lowrank.training.evaluate import next_token_loss
from dist_lowrank.training.model import build_model
from dist_lowrank.training.planned_parameters import planned_parameters
from dist_lowrank.training.strategy import make_strategy

OF_COEFFICIENTS = [
    ["optimizer=galore", "optimizer.refresh_interval=2"],
    ["optimizer=dct_adamw", "optimizer.selection=previous"],
]
OF_STEP = ("activations", "temporaries")


def test_plan_tells_every_rank_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [*TINY, "train.global_batch_size=12"]
    assert main(["plan", "--world-size", "3", "--json", "--device", "1GiB", *overrides]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(kind["first_rank"], kind["last_rank"]) for kind in told["memory"]] == [(0, 1), (2, 2)]
    expected = Planner(compose(overrides), 3, traced=False).plan().held
    for kind in told["memory"]:
        for cause, counts in expected.items():
            assert kind["bytes"][cause] == counts[kind["first_rank"]] == counts[kind["last_rank"]]
        assert kind["bytes"]["peak"] == max(kind["bytes"][name] for name in kind["bytes"] if name.startswith("peak of"))
    verdict = told["verdict"]
    assert verdict["fits"]
    assert verdict["allowed_bytes"] == int(0.9 * 2**30)
    assert verdict["largest_rank"] == 12
    assert not dist.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_a_plan_notes_that_the_dictionary_of_auto_is_an_upper_bound() -> None:
    for transform, noted in (("auto", True), ("gemm", False)):
        plan = Planner(compose([*TINY, f"optimizer.transform={transform}"]), 2, traced=False).plan()
        assert any(note.startswith("dictionary: at most") for note in plan.notes) == noted


def test_the_largest_micro_batch_and_rank_fit_and_larger_ones_do_not() -> None:
    planner = Planner(compose([*TINY, "train.global_batch_size=4"]), 2)
    allowed_bytes = int(planner.plan(5).peak_bytes.max())
    assert largest_micro_batch(planner, allowed_bytes) == 5
    assert planner.plan(6).peak_bytes.max() > allowed_bytes
    rank_3, rank_4 = (planner.with_rank(rank) for rank in (3, 4))
    of_steps = max(int(rank_3.forward_backward_bytes.max()), int(rank_3.update_bytes.max()))
    assert int(rank_4.update_bytes.max()) > int(rank_3.update_bytes.max())
    assert largest_rank(planner, of_steps) == 3
    assert largest_rank(planner, 1000) == largest_micro_batch(planner, 1000) == 0


def test_the_largest_micro_batch_is_told_as_a_plan_of_it_is() -> None:
    """From a micro-batch at whose peak there are gradients, to one at whose peak there are activations."""
    overrides = [*TINY, "train.micro_batch_size=1", "optimizer=adamw"]  # whose update is traced quickly
    planner = Planner(compose([*overrides, "train.global_batch_size=16"]), 2)
    allowed_bytes = 50 * int(planner.plan().peak_bytes.max())
    largest = largest_micro_batch(planner, allowed_bytes)
    assert largest is not None
    assert largest > 50
    config = compose([*overrides, f"train.micro_batch_size={largest}", f"train.global_batch_size={2 * largest}"])
    told = Planner(config, 2)
    assert int(told.plan().peak_bytes.max()) <= allowed_bytes
    assert int(told.plan(largest + largest // 50).peak_bytes.max()) > allowed_bytes
    accumulating = int(planner.plan(7).forward_backward_bytes.max())  # of 8: in two passes, which need more than one
    assert largest_micro_batch(planner, accumulating) in (7, 8)


def test_a_plan_that_does_not_fit_ends_with_code_5(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--world-size", "2", "--device", "300KiB"]) == 5
    assert "does not fit: 0.00 GiB on rank 0, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h1000"], "error: --device: h1000 is not allowed; did you mean h100? "),
        (["--device", "h100", "--margin", "1"], "error: --margin: 1 is not allowed; allowed: "),
        (["--world-size", "0"], "error: --world-size: 0 is not allowed; allowed: an integer >= 1"),
        (["--world-size", "4", "--nodes", "3"], "error: --nodes: 3 is not allowed with 4 ranks; "),
        (["--world-size", "3"], "error: train.global_batch_size: 8 is not allowed with 3 processes; "),
        (["--world-size", "abc"], "error: --world-size: abc is not allowed; allowed: an integer >= 1"),
        (["--margin", "10%"], "error: --margin: 10% is not allowed; allowed: a share "),
        (["--device", "-8GiB"], "error: --device: -8GiB is not allowed; allowed: 1 to 2^60 bytes such as 80GiB, or"),
        (["--device", "0GiB"], "error: --device: 0GiB is not allowed; allowed: 1 to 2^60 bytes such as 80GiB, or "),
        (["--device", "0.1"], "error: --device: 0.1 is not allowed; allowed: 1 to 2^60 bytes such as 80GiB, or "),
        (["--device", "9" * 400], f"error: --device: {'9' * 400} is not allowed; allowed: 1 to 2^60 bytes"),
        (["--device="], "error: --device: nothing is not allowed; allowed: 1 to 2^60 bytes such as 80GiB, or one of"),
        (["--device", "8GiB", "--no-trace"], "error: --device: 8GiB is not allowed with --no-trace"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *TINY, *arguments]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_the_option_that_says_how_many_ranks_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--world-size", "3"]) == 2
    assert capsys.readouterr().err.endswith("or another --world-size\n")


def test_reconciling_takes_no_other_options_and_refuses_what_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--reconcile", "no/such/run", "optimizer=adamw", "--world-size", "2", "--device", "a40"]) == 2
    ignored = "error: --world-size --device optimizer=adamw: is not allowed with --reconcile"
    assert capsys.readouterr().err.startswith(ignored)
    program = (
        "import sys; from dist_lowrank.cli import main; code = main(['plan', '--reconcile', 'no/such/run']);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: no/such/run: ")


def test_without_a_trace_no_peak_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--world-size", "1", "--no-trace", "optimizer=adamw"]) == 0
    told = capsys.readouterr().out
    assert ": 1 rank, " in told
    assert "parameters" in told
    assert "not traced: " in told
    assert not re.search(r"^peak|~|nothing estimated|between refreshes", told, re.MULTILINE)


def test_equal_ranks_are_one_column() -> None:
    """Also of more ranks than are told one by one."""
    plan = Planner(compose([*TINY, "train.global_batch_size=32", "strategy=ddp", "optimizer=adamw"]), 32, traced=False)
    assert [heading for heading, _ in columns(plan.plan())] == ["ranks 0-31"]


def test_a_reader_that_has_gone_ends_what_prints_without_a_traceback() -> None:
    program = "from dist_lowrank.planning import verb\nwith verb._ending_with_its_reader(): print('line')"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGPIPE


def test_the_examples_of_the_help_are_allowed() -> None:
    examples = re.findall(r"dist-lowrank plan (model=.*)", verb._EPILOG)
    assert len(examples) == 2
    for example in examples:
        parser = argparse.ArgumentParser()
        verb.add_plan(parser.add_subparsers())
        options = parser.parse_args(["plan", *example.split()])
        config, world_size, _ = verb._resolve(compose(options.overrides), options)
        assert planned_parameters(config)
        assert world_size in (8, 16)


def test_devices_have_their_published_memory() -> None:
    assert capacity_bytes("H100") == capacity_bytes("h100-80gb") == capacity_bytes("80GiB") == 80 * 2**30
    assert capacity_bytes("A100") == capacity_bytes("a100 80gb") == 80 * 2**30
    assert capacity_bytes("24GB") == 24 * 10**9
    assert capacity_bytes("12345") == 12345


@pytest.mark.parametrize("optimizer", ["dct_adamw", "galore"])
def test_copies_are_traced_too(optimizer: str) -> None:
    config = compose([*TINY, "strategy=ddp", f"optimizer={optimizer}"])
    estimate = estimate_step(config, 2)
    assert any(row.operation == "all_gather" for row in estimate.traffic)
    assert estimate.refresh.most["refresh_workspace"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["strategy=fsdp", "precision=bf16"], ["strategy=ddp", "optimizer=adamw"]])
def test_blocks_that_are_not_traced_are_told_to_the_byte(overrides: list[str]) -> None:
    config = with_blocks(compose([*TINY, *overrides]), 7)
    told, whole = estimate_step(config, 2), trace(config, 2, None, (2,))
    assert told.passes.at_peak == whole.passes[2].at_peak
    assert told.passes.most == whole.passes[2].most
    assert whole.updates is not None
    assert told.refresh.at_peak == whole.updates.refresh.at_peak
    for cause, held in whole.updates.first.at_peak.items():  # which makes dictionaries in the middle of a wave
        assert told.first.at_peak[cause] == pytest.approx(held, rel=0.02)


def _sent(rank: int, config: RunConfig) -> int:
    strategy = make_strategy(config, build_model(config), torch.device("cpu"))
    tokens = torch.zeros(2, 16, dtype=torch.long)
    strategy.backward(next_token_loss(strategy.model, tokens), last=True)  # afterwards, all is set up
    with CountCollectives() as counter:
        for last in (False, True):
            strategy.backward(next_token_loss(strategy.model, tokens), last=last)
    return sum(counter.sent_bytes)


@pytest.mark.parametrize(("strategy", "processes"), [("fsdp", 3), ("hsdp", 4)])
def test_planned_traffic_of_a_strategy_is_what_it_sends(strategy: str, processes: int) -> None:
    shard_size = ["strategy.shard_size=2"] if strategy == "hsdp" else []
    batch = f"train.global_batch_size={4 * processes}"
    config = compose([*TINY, f"strategy={strategy}", *shard_size, batch, "precision=bf16"])
    planned = strategy_traffic(config, planned_parameters(config), processes)
    assert run_on_ranks(processes, _sent, config)[0] == sum(row.bytes for row in planned)


def _coefficients_sent(rank: int, config: RunConfig) -> list[int]:
    """Of gradients, in steps 2 to 5; beside, DDP broadcasts the model's buffers."""
    strategy: Any = make_strategy(config, build_model(config), torch.device("cpu"))
    tokens, sent = torch.randint(1, 300, (2, 16)), []
    for step in range(1, 6):
        with CountCollectives() as counter:
            strategy.backward(next_token_loss(strategy.model, tokens), last=True)
        if step > 1:
            calls = zip(counter.calls, counter.sent_bytes, strict=True)
            sent.append(sum(size_bytes for (name, _), size_bytes in calls if name == "allreduce_"))
        strategy.prepare()
        strategy.step(skip=False)
    return sent


@pytest.mark.parametrize("optimizer", OF_COEFFICIENTS)
def test_planned_gradients_are_coefficients_where_these_are_summed(optimizer: list[str]) -> None:
    overrides = [*optimizer, "optimizer.rank=3", "precision=fp32"]
    config = compose([*TINY, "strategy=ddp", "strategy.low_rank_gradients=true", *overrides])
    planned = [row.bytes for row in strategy_traffic(config, planned_parameters(config), 2)]
    sent = run_on_ranks(2, _coefficients_sent, config)[0]
    assert set(sent) == set(planned)
    assert len(planned) == (2 if "optimizer.refresh_interval=2" in optimizer else 1)


def test_a_run_holds_what_was_planned(tmp_path: Path) -> None:
    """Uneven shards, accumulation of gradients, a tracked step of each kind."""
    (tmp_path / "text").mkdir()
    text = write_text(tmp_path / "text")
    more = ["train.steps=4", "train.global_batch_size=12", "telemetry.memory_tracker_steps=[1,2,3]", "strategy=fsdp"]
    folder = folder_of(overrides_for(text, tmp_path / "runs", *more, "optimizer.refresh_interval=2"))
    run_on_ranks(3, run_loop, folder)
    found = reconcile(str(folder.path))
    assert {"gradients", "gathered_parameters", "collective_buffers", "diagnostics"} <= found.planned.keys()
    for rank in range(3):
        for cause, planned in found.planned.items():
            measured = found.measured[cause][rank]
            assert measured is not None, cause
            if cause in OF_STEP:
                assert planned[rank] == pytest.approx(measured, rel=0.1), cause
            elif cause == "refresh_workspace" and rank == 2:  # the plan is of rank 0, which has the most rows
                assert planned[rank] > measured
            elif cause not in (TOTAL, "residual"):
                assert planned[rank] == measured, (cause, rank)
        residual, total = found.measured["residual"][rank], found.measured[TOTAL][rank]
        assert residual is not None
        assert total is not None
        assert found.planned[TOTAL][rank] == pytest.approx(total - residual, rel=0.05)
