"""What `dist-lowrank check` says a step will send is what a run of as many processes sends."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from collectives import CountCollectives
from processes import run_on_ranks
from small_runs import TINY

from dist_lowrank.cli import main
from dist_lowrank.config import compose
from dist_lowrank.strategies import apply_strategy
from dist_lowrank.training.model import blocks, build_model, low_rank_forms, route
from dist_lowrank.training.optimizers import make_optimizer

# What carries each purpose, as it is counted on gloo.
OPERATIONS = {"all_reduce": "allreduce_", "all_gather": "allgather_", "all_to_all": "alltoall_base_"}
Totals = dict[str, tuple[int, int]]  # by counted operation: calls and bytes


def _printed(text: str) -> dict[str, Totals]:
    """By kind of step."""
    by_step: dict[str, Totals] = {}
    row = r"^([a-z0-9, ]+?)  +(\w+)  +(\w*) +(\d+)  +([\d,]+)$"
    for step, _, operation, calls, size in re.findall(row, text.partition("what the optimizer sends")[2], re.MULTILINE):
        totals = by_step.setdefault(step, {})
        if int(calls):
            before = totals.get(OPERATIONS[operation], (0, 0))
            totals[OPERATIONS[operation]] = (before[0] + int(calls), before[1] + int(size.replace(",", "")))
    return by_step


def _sent(rank: int, overrides: list[str]) -> list[Totals]:
    """At each of 4 steps with gradients of rank 1; the first also compares replicas."""
    config = compose(overrides)
    model = build_model(config)
    forms = low_rank_forms(route(model, config), config)
    wrapped = apply_strategy(model, blocks(model), config.strategy, config.precision, forms, torch.device("cpu"))
    updater = make_optimizer(config, route(model, config))
    steps = []
    for _ in range(4):
        for parameter in wrapped.parameters():
            parameter.grad = torch.ones_like(parameter)
        with CountCollectives() as counter:
            updater.step()
        totals: Totals = {}
        for (name, _), size in zip(counter.calls, counter.sent_bytes, strict=True):
            before = totals.get(name, (0, 0))
            totals[name] = (before[0] + 1, before[1] + size)
        steps.append(totals)
    return steps


@pytest.mark.parametrize(
    ("processes", "overrides", "operations"),
    [
        (2, ["strategy=fsdp"], {"allreduce_"}),
        (2, ["strategy=ddp"], {"allreduce_", "allgather_"}),
        (3, ["strategy=fsdp"], {"allreduce_", "alltoall_base_", "allgather_"}),  # 28 columns do not divide
        (4, ["strategy=hsdp", "strategy.shard_size=2"], {"allreduce_"}),
    ],
)
@pytest.mark.parametrize("optimizer", ["dct_adamw", "trion"])
def test_check_prints_what_a_run_sends(
    processes: int, overrides: list[str], operations: set[str], optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*TINY, *overrides, f"optimizer={optimizer}", "train.global_batch_size=12", "launcher.device=cpu"]
    overrides += [f"launcher.nproc_per_node={processes}"]
    if optimizer == "dct_adamw":
        overrides += ["optimizer.refresh_interval=3"]
    assert main(["check", *overrides]) == 0
    assert not dist.is_initialized()
    printed = _printed(capsys.readouterr().out)
    _, between, refresh, _ = run_on_ranks(processes, _sent, overrides)[0]
    assert set(refresh) == operations
    if optimizer == "dct_adamw":
        assert printed["refresh"] == refresh
        assert printed["between refreshes"] == between
    else:
        assert printed["every step"] == refresh == between
    assert printed["every 100 steps"]["allgather_"][0] == 1


@pytest.mark.parametrize(("optimizer", "later"), [("galore", "refresh, at most"), ("subtrack", "refresh")])
def test_check_prints_what_an_svd_of_gradients_of_a_low_rank_sends(
    optimizer: str, later: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*TINY, "strategy=fsdp", f"optimizer={optimizer}", "optimizer.refresh_interval=3"]
    overrides += ["launcher.device=cpu", "launcher.nproc_per_node=2"]
    assert main(["check", *overrides]) == 0
    text = capsys.readouterr().out
    printed = _printed(text)
    first, between, _, refresh = run_on_ranks(2, _sent, overrides)[0]
    assert printed[later] == refresh
    assert printed["between refreshes"] == between
    assert printed["refresh, at most" if optimizer == "galore" else "first step, at most"] == first
    assert "lower numerical rank than the subspace" in text


def test_check_prints_what_a_change_of_shared_dictionaries_sends_beside_the_rest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = [*TINY, "strategy=ddp", "optimizer.dictionary=shared", "optimizer.dictionary_interval=4"]
    overrides += ["launcher.device=cpu", "launcher.nproc_per_node=2"]
    assert main(["check", *overrides]) == 0
    printed = _printed(capsys.readouterr().out)
    _, ordinary, _, change = run_on_ranks(2, _sent, overrides)[0]
    assert printed["every step"] == ordinary
    calls, size = printed["every 4 steps"]["allreduce_"]
    assert calls == 2  # traces, Gram matrices
    assert change["allreduce_"] == (calls + ordinary["allreduce_"][0], size + ordinary["allreduce_"][1])


def test_check_says_that_adamw_sends_nothing_and_what_is_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *TINY, "optimizer=adamw", "launcher.device=cpu"]) == 0
    text = capsys.readouterr().out
    assert _printed(text) == {"every step": {}}
    assert "(without what fsdp itself sends for gradients and weights)" in text


def test_check_counts_scores_once_where_they_come_with_the_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*TINY, "strategy=ddp", "optimizer.selection=previous", "launcher.device=cpu"]
    sums = []
    for low_rank in ("false", "true"):
        assert main(["check", *overrides, f"strategy.low_rank_gradients={low_rank}"]) == 0
        sums.append("allreduce_" in _printed(capsys.readouterr().out)["every step"])
    assert sums == [True, False]
