"""The training loop on real processes: one trajectory whatever the strategy, votes, accumulation, precision, export."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401 (imported before the fork, so that the ranks need not)
from collectives import CountCollectives
from processes import run_on_ranks
from small_runs import assert_events_equal_lines, folder_of, full_weights, losses, overrides_for, run_loop
from support_matrix import supports
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_lowrank.config import RunFolder, compose
from dist_lowrank.strategies import apply_strategy
from dist_lowrank.telemetry.console import Console
from dist_lowrank.telemetry.metrics import MetricsWriter
from dist_lowrank.training.model import blocks, build_model, low_rank_forms, route
from dist_lowrank.training.optimizers import make_optimizer
from dist_lowrank.training.parameter_table import parameter_table
from dist_lowrank.training.run import Trainer, train


@cache
def one_process(text: str, runs: Path, *more: str) -> dict[str, Any]:
    return run_on_ranks(1, run_loop, folder_of(overrides_for(text, runs, "strategy=ddp", *more)))[0]


@supports("exact")
@pytest.mark.parametrize("optimizer", ["dct_adamw", "trion"])
@pytest.mark.parametrize(
    ("strategy", "world_size"), [("ddp", 2), ("ddp", 4), ("fsdp", 1), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]
)
def test_the_real_model_follows_the_one_process_trajectory_in_float64(
    text: str, tmp_path_factory: pytest.TempPathFactory, strategy: str, world_size: int, optimizer: str
) -> None:
    runs = tmp_path_factory.getbasetemp() / "runs"
    common = ["precision=fp64", "train.steps=6", f"optimizer={optimizer}"]
    expected = one_process(text, runs, *common)
    more = ["strategy.shard_size=2"] if strategy == "hsdp" else []
    folder = folder_of(overrides_for(text, runs, f"strategy={strategy}", *more, *common))
    results = run_on_ranks(world_size, run_loop, folder)
    for result in results:
        torch.testing.assert_close(losses(result), losses(expected), atol=1e-8, rtol=0)
        assert result["entries"][-1]["loss/validation"] == pytest.approx(
            expected["entries"][-1]["loss/validation"], abs=1e-8
        )
    assert results[0]["weights"].keys() == expected["weights"].keys()
    for name, weight in results[0]["weights"].items():
        torch.testing.assert_close(weight, expected["weights"][name], atol=1e-8, rtol=0)


def test_accumulation_does_not_change_the_trajectory(text: str, tmp_path: Path) -> None:
    common = ["precision=fp64", "train.steps=3", "strategy=fsdp"]
    found = []
    for size in (4, 3, 1):  # whole, uneven, one by one
        folder = folder_of(overrides_for(text, tmp_path, *common, f"train.micro_batch_size={size}"))
        found.append(losses(run_on_ranks(2, run_loop, folder)[0]))
    torch.testing.assert_close(found[1], found[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(found[2], found[0], atol=1e-10, rtol=0)


def test_gathered_weights_that_stay_for_the_backward_pass_change_nothing(text: str, tmp_path: Path) -> None:
    """Evaluations, which no backward pass follows, and a save after one included."""
    common = ("train.steps=2", "train.eval_interval=1", "strategy=fsdp", "checkpoint.interval_steps=1")
    found = []
    for keep in ("true", "false"):
        more = (f"strategy.reshard_after_forward={keep}", f"name=reshard_{keep}")
        found.append(run_on_ranks(2, run_loop, folder_of(overrides_for(text, tmp_path, *common, *more)))[0])
    assert losses(found[0]) == losses(found[1])
    assert all(torch.equal(found[0]["weights"][name], weight) for name, weight in found[1]["weights"].items())


def test_activation_checkpointing_does_not_change_the_trajectory(text: str, tmp_path: Path) -> None:
    found = []
    for enabled in ("false", "true"):
        more = ["precision=fp64", "train.steps=2", f"model.activation_checkpointing={enabled}"]
        found.append(losses(run_on_ranks(2, run_loop, folder_of(overrides_for(text, tmp_path, *more)))[0]))
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bf16_trains_close_to_fp32_and_keeps_fp32_weights(text: str, tmp_path: Path, strategy: str) -> None:
    common = ["train.steps=10", f"strategy={strategy}"]
    full = run_on_ranks(2, run_loop, folder_of(overrides_for(text, tmp_path, *common)))[0]
    mixed = run_on_ranks(2, run_loop, folder_of(overrides_for(text, tmp_path, *common, "precision=bf16")))[0]
    assert losses(mixed) != losses(full)  # it is another arithmetic
    torch.testing.assert_close(losses(mixed), losses(full), atol=0.02, rtol=0)
    assert {weight.dtype for weight in mixed["weights"].values()} == {torch.float32}


def _run_with_poison(rank: int, folder: RunFolder) -> dict[str, Any]:
    """One gradient element of one rank is infinite at the second step."""
    with MetricsWriter(folder.metrics(rank), None) as metrics:
        trainer = Trainer(folder.config(), folder, torch.device("cpu"), Console(enabled=False), metrics)
        before: dict[str, torch.Tensor] = {}
        backward = trainer._forward_backward

        def poisoned(step: int) -> torch.Tensor:
            loss = backward(step)
            if trainer.data.train.state_dict()["samples"] == 16:
                before.update({key: value.clone() for key, value in full_weights(trainer).items()})
                if rank == 1:
                    local = next(trainer.strategy.model.parameters()).grad.to_local()
                    local[0, 0] = math.inf
            return loss

        trainer._forward_backward = poisoned  # type: ignore[method-assign]
        steps_before = trainer.optimizer.state_dict()
        trainer._step(1, [])
        counters = _steps(trainer)
        trainer._step(2, [])
        after = full_weights(trainer)
        unchanged = all(torch.equal(before[key], after[key]) for key in after) if rank == 0 else None
        skipped_counters = _steps(trainer)
        trainer._step(3, [])
        assert steps_before is not None
        moved = any(not torch.equal(after[key], value) for key, value in full_weights(trainer).items())
    return {
        "unchanged": unchanged,
        "counters": (counters, skipped_counters, _steps(trainer)),
        "skipped": trainer.progress.skipped_steps,
        "moved": moved,
    }


def _steps(trainer: Trainer) -> set[int]:
    return {int(state["step"]) for state in trainer.optimizer.state.values()}


def test_an_infinite_gradient_on_one_rank_skips_the_update_on_all(text: str, tmp_path: Path) -> None:
    folder = folder_of(overrides_for(text, tmp_path, "strategy=fsdp", "train.steps=3"))
    results = run_on_ranks(2, _run_with_poison, folder)
    for result in results:
        assert result["skipped"] == 1
        assert result["counters"] == ({1}, {1}, {2})  # the skipped step does not count as one
    assert results[0]["unchanged"]
    assert results[0]["moved"]


def _train(rank: int, folder: RunFolder) -> int:
    return train(folder.config(), folder, torch.device("cpu"))


def test_a_run_writes_equal_event_files_and_lines_exports_and_can_be_continued_from(text: str, tmp_path: Path) -> None:
    overrides = overrides_for(text, tmp_path, "train.steps=8", "train.export=true", "telemetry.tensorboard=true")
    folder = folder_of(overrides)
    assert run_on_ranks(2, _train, folder) == [0, 0]
    for rank in range(2):
        assert_events_equal_lines(folder, rank)
        tags = {tag for line in folder.metrics(rank).read_text().splitlines() for tag in json.loads(line)}
        families = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        causes = ("parameters", "gradients", "moments", "dense_moments", "indices", "dictionary")
        assert tags >= {
            "loss/train",
            "loss/validation",
            "perplexity/validation",
            "learning_rate",
            "gradient_norm",
            "throughput/tokens_per_second",
            "throughput/model_flops_per_second",
            "optimizer/milliseconds",
            *(f"captured_energy/{family}" for family in families),
            *(f"memory_bytes/{cause}" for cause in causes),
        }
    summary = json.loads((folder.path / "FINISHED").read_text())
    assert summary["steps"] == 8

    model = AutoModelForCausalLM.from_pretrained(folder.export)
    assert len(AutoTokenizer.from_pretrained(folder.export)) == model.config.vocab_size
    assert any(path.suffix == ".safetensors" for path in folder.export.iterdir())

    more = ["model=pretrained", f"model.pretrained={folder.export}", "train.steps=1"]
    skip = ("model.config",)
    tuned = folder_of([o for o in overrides if not o.startswith(skip)] + more)
    run_on_ranks(2, _train, tuned)
    first = json.loads(tuned.metrics(0).read_text().splitlines()[0])
    assert first["loss/validation"] == pytest.approx(summary["validation_loss"], abs=1e-5)


def test_memory_of_a_rank_is_its_share(text: str, tmp_path: Path) -> None:
    """Moments of matrices: two of L x r in float32, divided by the ranks, uneven shards included."""
    result = run_on_ranks(2, run_loop, folder_of(overrides_for(text, tmp_path, "train.steps=1")))
    moments = [r["entries"][1]["memory_bytes/moments"] for r in result]
    # Per layer, n = 12 and r = 3: four of 12 rows, gate, up and down of 28 rows; over two layers, two moments.
    assert sum(moments) == 2 * 2 * (4 * 12 + 3 * 28) * 3 * 4
    assert moments[0] == moments[1]


@pytest.mark.slow
def test_compiled_blocks_follow_the_same_trajectory(text: str, tmp_path: Path) -> None:
    found = []
    for enabled in ("false", "true"):
        more = ["precision=fp64", "train.steps=2", f"model.compile={enabled}"]
        folder = folder_of(overrides_for(text, tmp_path, *more))
        found.append(losses(run_on_ranks(2, run_loop, folder, timeout_seconds=280)[0]))
    torch.testing.assert_close(found[1], found[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"error_feedback": "int4", "moment_dtype": "int8"}, {"dictionary": "shared"}], ids=str
)
def test_the_parameter_table_tells_the_bytes_of_state_that_are_held(
    text: str, tmp_path: Path, options: dict[str, str]
) -> None:
    more = [f"optimizer.{key}={value}" for key, value in options.items()]
    folder = folder_of(overrides_for(text, tmp_path, "strategy=ddp", "train.steps=1", *more))
    (result,) = run_on_ranks(1, run_loop, folder)
    causes = ("moments", "dense_moments", "indices", "shared_dictionary", "error_feedback", "other_state")
    held = sum(result["entries"][1][f"memory_bytes/{cause}"] for cause in causes)
    assert sum(row.state_bytes for row in parameter_table(folder.config(), 1)) == held


@pytest.mark.parametrize(("optimizer", "strategy"), [("dct_adamw", "fsdp"), ("trion", "ddp")])
def test_bf16_weights_train_and_notice_small_updates_with_stochastic_rounding(
    text: str, tmp_path: Path, optimizer: str, strategy: str
) -> None:
    common = [f"optimizer={optimizer}", "precision=bf16_weights", f"strategy={strategy}", "train.steps=2"]
    rates = {"dct_adamw": ["optimizer.lr=1e-6"], "trion": ["optimizer.lr=2e-5", "optimizer.dense_lr=1e-6"]}
    common += rates[optimizer]
    found = {}
    for rounding in ("nearest", "stochastic"):
        folder = folder_of(overrides_for(text, tmp_path, *common, f"optimizer.weight_rounding={rounding}"))
        result = run_on_ranks(2, run_loop, folder)[0]
        assert all(math.isfinite(loss) for loss in losses(result))
        found[rounding] = result["weights"]
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):  # dense and low-rank
        left, right = found["nearest"][name], found["stochastic"][name]
        assert left.dtype == right.dtype == torch.bfloat16
        assert (left != right).any()
        # Not more than a step of bf16 apart, or the updates themselves where weights are that small.
        torch.testing.assert_close(left, right, rtol=2.0**-6, atol=1e-4)


def _collectives_of_the_default_model(rank: int, optimizer: str) -> list[tuple[str, int]]:
    config = compose([f"optimizer={optimizer}"])
    model = build_model(config)
    forms = low_rank_forms(route(model, config), config)
    apply_strategy(model, blocks(model), config.strategy, config.precision, forms, torch.device("cpu"))
    updater = make_optimizer(config, route(model, config))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with CountCollectives() as counter:
        updater.step()
    return counter.calls


def test_one_step_of_the_default_model_sends_one_all_reduce_and_trion_two() -> None:
    matrices, n, r = 28, 128, 32  # of four layers: q, k, v, o, gate, up, down
    for calls in run_on_ranks(2, _collectives_of_the_default_model, "dct_adamw"):
        assert calls == [("allreduce_", matrices * n)]
    for calls in run_on_ranks(2, _collectives_of_the_default_model, "trion"):
        assert calls == [("allreduce_", matrices * n), ("allreduce_", matrices * r * r)]
