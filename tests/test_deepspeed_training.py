"""Training runs under `strategy=zero0` to `zero3`: the numbers of FSDP2, telemetry, export, refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import deepspeed_runs  # noqa: F401 (imports DeepSpeed before the fork)
import pytest
import torch
from collectives import CountCollectives
from deepspeed_runs import set_environment
from processes import run_on_ranks
from small_runs import folder_of, full_weights, losses, overrides_for, run_loop
from transformers import AutoModelForCausalLM

from dist_lowrank.config import ConfigError, RunFolder, compose, open_run
from dist_lowrank.config.deepspeed_json import deepspeed_json
from dist_lowrank.telemetry.console import Console
from dist_lowrank.telemetry.metrics import MetricsWriter
from dist_lowrank.training import run
from dist_lowrank.training.parameter_table import parameter_table
from dist_lowrank.training.run import Trainer, train
from dist_lowrank.training.traffic_forecast import forecast_traffic

ZERO = ["zero0", "zero1", "zero2", "zero3"]


def pairs(quick: set[tuple[str, Any]], others: Iterable[Any]) -> list[Any]:
    """Every strategy with each of the others; those that are not quick only in `make test-all`."""
    combinations = product(ZERO, others)
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in combinations]


def _loop(rank: int, folder: RunFolder) -> dict[str, Any]:
    set_environment()
    return run_loop(rank, folder)


@cache
def by_fsdp(text: str, runs: Path, *more: str) -> dict[str, Any]:
    return run_on_ranks(2, run_loop, folder_of(overrides_for(text, runs, "strategy=fsdp", *more)))[0]


@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    pairs(
        {("zero0", "dct_adamw"), ("zero1", "trion"), ("zero2", "dct_adamw"), ("zero3", "trion"), ("zero3", "adamw")},
        ["dct_adamw", "trion", "adamw"],
    ),
)
def test_the_real_model_follows_the_trajectory_of_fsdp2(
    text: str, tmp_path_factory: pytest.TempPathFactory, strategy: str, optimizer: str
) -> None:
    """Two micro-batches per step, one of three samples and one of one; clipping; a schedule."""
    runs = tmp_path_factory.getbasetemp() / "zero_runs"
    common = ["train.steps=12", "train.clip_norm=0.5", "train.micro_batch_size=3", f"optimizer={optimizer}"]
    expected = by_fsdp(text, runs, *common)
    results = run_on_ranks(2, _loop, folder_of(overrides_for(text, runs, f"strategy={strategy}", *common)))
    for result in results:
        torch.testing.assert_close(losses(result), losses(expected), atol=2e-5, rtol=0)
        for found, entry in zip(result["entries"], expected["entries"], strict=True):
            for tag in ("gradient_norm", "loss/validation", "learning_rate", "captured_energy/q_proj"):
                assert (tag in found) == (tag in entry)
                assert found.get(tag, 0.0) == pytest.approx(entry.get(tag, 0.0), rel=1e-4), tag
    assert results[0]["weights"].keys() == expected["weights"].keys()
    for name, weight in results[0]["weights"].items():
        torch.testing.assert_close(weight, expected["weights"][name], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "strategy", [pytest.param(each, marks=() if each in ("zero1", "zero3") else pytest.mark.slow) for each in ZERO]
)
def test_bf16_ends_where_fsdp2_ends(text: str, tmp_path_factory: pytest.TempPathFactory, strategy: str) -> None:
    runs = tmp_path_factory.getbasetemp() / "zero_runs"
    common = ["train.steps=40", "precision=bf16"]
    expected = by_fsdp(text, runs, *common)["entries"][-1]["loss/validation"]
    (result, _) = run_on_ranks(2, _loop, folder_of(overrides_for(text, runs, f"strategy={strategy}", *common)))
    assert result["entries"][-1]["loss/validation"] == pytest.approx(expected, rel=0.005)
    assert result["entries"][-1]["loss/validation"] < result["entries"][0]["loss/validation"] - 0.2
    assert {weight.dtype for weight in result["weights"].values()} == {torch.bfloat16}


def _poisoned(rank: int, folder: RunFolder) -> dict[str, Any]:
    """The gradient of one rank is not finite at the second step."""
    set_environment()
    with MetricsWriter(folder.metrics(rank), None) as metrics:
        trainer = Trainer(folder.config(), folder, torch.device("cpu"), Console(enabled=False), metrics)
        loss = run.next_token_loss
        trainer._step(1, [])
        before = full_weights(trainer)
        if rank == 1:
            run.next_token_loss = lambda *arguments: loss(*arguments) * math.inf  # type: ignore[assignment]
        trainer._step(2, [])
        run.next_token_loss = loss  # type: ignore[assignment]
        after = full_weights(trainer)
        trainer._step(3, [])
        moved = any(not torch.equal(after[name], weight) for name, weight in full_weights(trainer).items())
        rate = trainer.optimizer.param_groups[0]["lr"]
    return {
        "unchanged": all(torch.equal(before[name], after[name]) for name in before),
        "moved": moved,
        "skipped": trainer.progress.skipped_steps,
        "learning_rate": rate,
    }


@pytest.mark.parametrize("strategy", ZERO)
def test_a_bad_gradient_on_one_rank_skips_the_update_and_not_the_schedule(
    text: str, tmp_path: Path, strategy: str
) -> None:
    folder = folder_of(overrides_for(text, tmp_path, f"strategy={strategy}", "train.steps=30"))
    first, second = run_on_ranks(2, _poisoned, folder)
    assert first["unchanged"]
    assert first["moved"]
    assert first["skipped"] == second["skipped"] == 1
    assert first["learning_rate"] == pytest.approx(
        folder.config().optimizer.lr
    )  # the peak, after three steps of warm-up


def _train(rank: int, folder: RunFolder) -> int:
    set_environment()
    return train(folder.config(), folder, torch.device("cpu"))


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_run_exports_the_whole_model(text: str, tmp_path: Path, strategy: str) -> None:
    overrides = overrides_for(text, tmp_path, f"strategy={strategy}", "train.steps=4", "train.export=true")
    folder = folder_of(overrides)
    assert run_on_ranks(2, _train, folder) == [0, 0]
    summary = json.loads((folder.path / "FINISHED").read_text())
    assert AutoModelForCausalLM.from_pretrained(folder.export).config.hidden_size == 12
    tuned = [each for each in overrides if not each.startswith(("model.config", "strategy"))]
    more = ["strategy=ddp", "model=pretrained", f"model.pretrained={folder.export}", "train.steps=1"]
    first = run_on_ranks(2, run_loop, folder_of([*tuned, *more]))[0]["entries"][0]
    assert first["loss/validation"] == pytest.approx(summary["validation_loss"], abs=1e-5)


# Bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"error_feedback": "int4", "moment_dtype": "int8"}, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(("strategy", "world_size"), [("zero0", 2), ("zero1", 4), ("zero2", 2), ("zero3", 4)])
def test_the_state_held_is_what_the_table_says(
    text: str, tmp_path: Path, strategy: str, world_size: int, options: dict[str, str]
) -> None:
    more = [f"optimizer.{key}={value}" for key, value in options.items()]
    folder = folder_of(overrides_for(text, tmp_path, f"strategy={strategy}", "train.steps=2", *more))
    causes = ("moments", "dense_moments", "indices", "error_feedback", "other_state")
    held = []
    for result in run_on_ranks(world_size, _loop, folder):
        (first, last) = [entry for entry in result["entries"] if "memory_bytes/moments" in entry]
        assert [first[f"memory_bytes/{cause}"] for cause in causes] == [
            last[f"memory_bytes/{cause}"] for cause in causes
        ]
        held.append(sum(last[f"memory_bytes/{cause}"] for cause in causes))
        assert last["memory_bytes/gradients"] > 0
        assert (last["memory_bytes/master_weights"] > 0) == (strategy != "zero0")
    assert max(held) == sum(row.state_bytes for row in parameter_table(folder.config(), world_size))


@pytest.mark.parametrize("world_size", [2, 4, 8, 64])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_the_matrices_of_llama_60m_take_a_third_of_the_state_of_adamw(strategy: str, world_size: int) -> None:
    """The fullest rank, with indices and torn rows; of AdamW the fullest rank too."""

    def matrices(optimizer: str) -> tuple[int, int]:
        config = compose([f"strategy={strategy}", "model=llama_60m", f"optimizer={optimizer}"])
        rows = [row for row in parameter_table(config, world_size) if len(row.shape) == 2 and "proj" in row.name]
        elements = sum(math.prod(row.shape) for row in rows)
        return sum(row.state_bytes for row in rows), elements

    low_rank, elements = matrices("dct_adamw")
    adamw = 8 * math.ceil(elements / world_size)
    assert low_rank <= 0.35 * adamw
    # The formula: two moments of L x n/4, over the ranks; r indices of two bytes and a step for each of 56 matrices.
    assert low_rank == pytest.approx(adamw / 4, rel=0.1 if world_size < 64 else 0.35)
    assert matrices("adamw")[0] >= adamw * 0.99 or strategy != "zero3"


def _traffic(rank: int, folder: RunFolder) -> list[tuple[str, int]]:
    """What the optimizer sends within the second training step."""
    set_environment()
    with MetricsWriter(folder.metrics(rank), None) as metrics:
        trainer = Trainer(folder.config(), folder, torch.device("cpu"), Console(enabled=False), metrics)
        trainer._step(1, [])
        step, calls = trainer.optimizer.step, []

        def counted(*arguments: Any) -> None:
            with CountCollectives() as counter:
                step(*arguments)
            calls.extend(counter.calls)

        trainer.optimizer.step = counted  # type: ignore[method-assign, assignment]
        trainer._step(2, [])
    return calls


@pytest.mark.parametrize(
    ("strategy", "optimizer"), pairs({("zero0", "trion"), ("zero2", "dct_adamw")}, ["dct_adamw", "trion"])
)
def test_a_step_sends_what_the_forecast_says(text: str, tmp_path: Path, strategy: str, optimizer: str) -> None:
    overrides = overrides_for(text, tmp_path, f"strategy={strategy}", f"optimizer={optimizer}", "train.steps=30")
    folder = folder_of(overrides)
    calls = run_on_ranks(2, _traffic, folder)[0]
    forecast = run_on_ranks(1, _forecast, folder, distributed=False)[0]
    assert sum(count for count, _ in forecast) == len(calls)
    assert sum(size for _, size in forecast) == 4 * sum(elements for _, elements in calls)


def _forecast(rank: int, folder: RunFolder) -> list[tuple[int, int]]:
    rows = forecast_traffic(folder.config(), 2)
    return [(row.collectives, row.bytes) for row in rows if row.step == "every step"]


# Configuration --------------------------------------------------------------------------------------------------------


def _refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        deepspeed_json(compose(overrides), 2)
    return str(caught.value)


def _json(folder: Path, content: Any) -> str:
    path = folder / "mine.json"
    path.write_text(json.dumps(content))
    return f"strategy.config={path}"


def test_the_json_of_a_run_says_what_the_run_says() -> None:
    config = compose(["strategy=zero3", "train.global_batch_size=24", "train.micro_batch_size=5", "precision=bf16"])
    found = deepspeed_json(config, 2)
    assert found["train_micro_batch_size_per_gpu"] == 5
    assert found["gradient_accumulation_steps"] == 3
    assert found["gradient_clipping"] == 1.0
    assert found["zero_optimization"] == {"stage": 3}
    assert found["bf16"]["enabled"] is True


def test_a_json_of_ones_own_is_merged(tmp_path: Path) -> None:
    mine = {
        "zero_optimization": {"sub_group_size": 1000, "stage": "auto"},
        "gradient_clipping": 1.0,
        "fp16": {"enabled": False},
        "train_batch_size": "auto",
        "steps_per_print": 5,
    }
    found = deepspeed_json(compose(["strategy=zero3", _json(tmp_path, mine)]), 2)
    assert found["zero_optimization"] == {"sub_group_size": 1000, "stage": 3}
    assert found["steps_per_print"] == 5
    assert not {"fp16", "train_batch_size"} & set(found)


@pytest.mark.parametrize(
    ("mine", "expected"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            "says zero_optimization.stage=3, but strategy=zero2; allowed: 2, or leave",
        ),
        ({"gradient_clipping": 5}, "says gradient_clipping=5, but train.clip_norm=1.0; allowed: 1.0, or leave it out"),
        ({"bf16": {"enabled": True}}, "says bf16.enabled=true, but precision=fp32; allowed: false, or leave it out"),
        ({"train_micro_batch_size_per_gpu": 77}, "but train.micro_batch_size="),
        ({"gradient_accumulation_steps": 77}, "on 2 ranks makes"),
        ({"optimizer": {"type": "AdamW"}}, "has 'optimizer'; allowed: the run's own, `optimizer=...`"),
        ({"scheduler": {"type": "WarmupLR"}}, "has 'scheduler'; allowed: the run's own, `schedule=...`"),
        ({"fp16": {"enabled": True}}, "has 'fp16'; allowed: none, `precision=fp32` or `precision=bf16`"),
        ({"zero_optimization": 2}, "says zero_optimization=2; allowed: a section"),
        ([], "holds list; allowed: a JSON object"),
    ],
)
def test_a_json_that_contradicts_the_run_is_refused(tmp_path: Path, mine: Any, expected: str) -> None:
    message = _refusal("strategy=zero2", _json(tmp_path, mine))
    assert message.startswith(f"strategy.config: {tmp_path}/mine.json ")
    assert expected in message


def test_what_zero_cannot_do_is_refused_by_its_key(tmp_path: Path) -> None:
    assert "cannot be read" in _refusal("strategy=zero2", "strategy.config=/no/such.json")
    assert "precision: fp64 is not allowed with strategy=zero2; allowed: fp32, bf16" in _refusal(
        "strategy=zero2", "precision=fp64"
    )
    assert "strategy.config: x.json is not allowed with fsdp; allowed: null" in _refusal("strategy.config=x.json")
    assert "strategy.shard_size: 2 is not allowed with zero1" in _refusal("strategy=zero1", "strategy.shard_size=2")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_the_command_trains_under_zero(text: str, tmp_path: Path, strategy: str) -> None:
    command = str(Path(sys.executable).with_name("dist-lowrank"))
    mine = _json(tmp_path, {"zero_optimization": {"sub_group_size": 3000}} if strategy == "zero3" else {})
    overrides = overrides_for(
        text, tmp_path / "runs", f"strategy={strategy}", mine, "train.steps=2", "train.export=true"
    )
    subprocess.run([command, "train", *overrides], check=True, timeout=200)
    (path,) = (each for each in (tmp_path / "runs").iterdir() if (each / "FINISHED").exists())
    assert (open_run(path).export / "config.json").exists()
