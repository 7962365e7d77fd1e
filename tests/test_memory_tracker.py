"""All memory of a step by cause: by hand for small modules, in training runs against torch's CPU allocator."""

from __future__ import annotations

import gc
import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from allocations import peaks_within
from processes import run_on_ranks
from small_runs import folder_of, overrides_for, write_text
from test_ledger import reachable_storage_bytes
from test_transient_memory import stand_for
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from dist_lowrank.config import RunFolder
from dist_lowrank.telemetry import tags
from dist_lowrank.telemetry.causes import OF_OPTIMIZER
from dist_lowrank.telemetry.console import Console
from dist_lowrank.telemetry.memory import bytes_by_cause, model_tensors, state_tensors
from dist_lowrank.telemetry.memory_tracker import MemoryTracker, StepMemory
from dist_lowrank.telemetry.metrics import MetricsWriter
from dist_lowrank.training.run import Trainer

# By hand ---------------------------------------------------------------------------------------------------------


class WithWorkspace(torch.optim.Optimizer):
    """Keeps a number for each element, and needs three for a moment."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["moment"] = torch.zeros_like(parameter)
            torch.cat([parameter, parameter, parameter])
            state["moment"].add_(parameter.grad)


def tracked(model: nn.Module, inputs: Tensor) -> StepMemory:
    """One step of WithWorkspace."""
    optimizer = WithWorkspace(model.parameters())

    def held() -> dict[str, list[Tensor]]:
        return {**model_tensors(model), **state_tensors(optimizer)}

    with MemoryTracker(model, optimizer, held, torch.device("cpu")) as tracker:
        model(inputs).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return tracker.told()


class Squares(nn.Module):
    """Keeps its input and two products for the backward pass; makes two more tensors that go."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))
        self.register_buffer("scale", torch.ones(50))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._block, x, use_reentrant=False) if self.recompute else self._block(x)

    def _block(self, x: Tensor) -> Tensor:
        (x.detach() + 1).sum()
        first = x * self.weight  # (n, 1000): saves x and the weight
        return first.square() * self.weight  # saves first, and its square


def test_each_cause_is_what_one_counts_by_hand() -> None:
    rows, bytes_of_rows = 3, 3 * 1000 * 4
    memory = tracked(Squares(), torch.ones(rows, 1000))
    assert memory.most["inputs"] == bytes_of_rows
    assert memory.most["buffers"] == 50 * 4
    assert memory.most["refresh_workspace"] == 3 * 1000 * 4
    assert memory.most["gathered_parameters"] == memory.most["collective_buffers"] == 0
    assert memory.most["activations"] == 2 * bytes_of_rows + 2 * 4  # saved; the loss and its gradient, 1
    assert memory.most["temporaries"] >= bytes_of_rows
    assert memory.at_peak["dense_moments"] in (0, 1000 * 4)
    assert sum(memory.at_peak.values()) == memory.total_bytes


def test_what_is_recomputed_in_the_backward_pass_is_activations() -> None:
    kept, recomputed = (tracked(Squares(recompute), torch.ones(30, 1000)) for recompute in (False, True))
    assert recomputed.most["activations"] >= kept.most["activations"] - 30 * 1000 * 4
    assert recomputed.at_peak["activations"] > 0


def test_a_state_that_the_step_makes_is_no_workspace() -> None:
    memory = tracked(nn.Linear(100, 100, bias=False), torch.ones(2, 100))
    assert memory.at_peak["dense_moments"] == memory.at_peak["parameters"] == memory.at_peak["gradients"] == 40_000
    assert memory.at_peak["refresh_workspace"] == memory.most["refresh_workspace"] == 3 * 40_000
    assert memory.total_bytes >= 6 * 40_000


def test_what_nobody_knows_of_is_residual() -> None:
    strange = torch.ones(5000)
    memory = tracked(nn.Linear(10, 10), torch.ones(2, 10))
    assert memory.at_peak["residual"] >= strange.nbytes


def test_a_storage_that_is_freed_by_resizing_is_freed() -> None:
    class Resized(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            scratch = torch.ones(100_000)
            scratch.untyped_storage().resize_(0)
            more = torch.ones(100_000)
            return super().forward(x) + 0 * more[0] + 0 * scratch.numel()

    memory = tracked(Resized(10, 10), torch.ones(2, 10))
    assert 400_000 <= memory.total_bytes - memory.at_peak["residual"] < 500_000


# In training -----------------------------------------------------------------------------------------------------

STRATEGIES = ("ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3")
LARGER = ["model.config.hidden_size=48", "model.config.intermediate_size=112"]
# By default DeepSpeed's buckets are 2 GB each, beside which all is little, and stage 3 never frees small weights.
DEEPSPEED = {"zero_optimization": {"reduce_bucket_size": 30_000, "stage3_param_persistence_threshold": 100}}


class MarkedTrainer(Trainer):
    """Whose steps can be found among the allocator's events."""

    def _step(self, step: int, stop: Any) -> Any:
        with record_function(f"step {step}"):
            return super()._step(step, stop)


def _train(rank: int, folder: RunFolder, ranks: int) -> tuple[dict[str, int], int, int]:
    """What the second step logged; in the end the ledger's state, and what is reached from the optimizer."""
    gc.freeze()  # the tracker looks for tensors: not for those of tests that ran before in this process
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    with MetricsWriter(folder.metrics(rank), None) as metrics:
        trainer = MarkedTrainer(folder.config(), folder, torch.device("cpu"), Console(enabled=False), metrics)
        trainer.run([])
    said: dict[str, int] = {}
    for line in folder.metrics(rank).read_text().splitlines():
        entry = json.loads(line)
        said |= entry if entry["step"] == 2 else {}
    tensors = trainer.strategy.tensors()
    by_cause = bytes_by_cause(tensors, trainer.optimizer)
    beside = [tensor for members in tensors.values() for tensor in members]
    state_bytes = sum(by_cause.get(cause, 0) for cause in OF_OPTIMIZER)
    return said, state_bytes, reachable_storage_bytes(trainer.optimizer, beside)


def _train_profiled(_: int, folder: RunFolder, ranks: int) -> tuple[dict[str, int], int]:
    """What the second step logged, and the most that torch's allocator had given out in it."""
    if ranks > 1:
        stand_for(0, ranks)
        make = dist.new_group
        dist.new_group = lambda *args, backend=None, **options: make(*args, **options)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        said, *_ = _train(0, folder, ranks)
    return said, peaks_within(profiler, "step ")["step 2"]


def _folder(text: str, runs: Path, strategy: str, optimizer: str) -> tuple[RunFolder, int]:
    """And the number of ranks."""
    return folder_of(_overrides(text, runs, strategy, optimizer)), 4 if strategy == "hsdp" else 2


def _overrides(text: str, runs: Path, strategy: str, optimizer: str) -> list[str]:
    more = [f"strategy={strategy}", f"optimizer={optimizer}", "train.steps=2", "telemetry.memory_tracker_steps=[2]"]
    more.append("checkpoint.at_end=false")  # one rank that stands for several has not all that belongs in one
    if strategy.startswith("zero"):
        (runs / "deepspeed.json").write_text(json.dumps(DEEPSPEED))
        more.append(f"strategy.config={runs / 'deepspeed.json'}")
    if strategy == "hsdp":
        more.append("strategy.shard_size=2")
    return overrides_for(text, runs, *LARGER, *more)


def _at_peak(said: dict[str, int]) -> tuple[dict[str, int], int]:
    """By cause, and in all."""
    prefix = tags.memory_at_peak_bytes("")
    by_cause = {tag.removeprefix(prefix): n for tag, n in said.items() if tag.startswith(prefix)}
    return by_cause, by_cause.pop("total")


def cases(*fast: tuple[str, str]) -> list[Any]:
    every = product(STRATEGIES, ("adamw", "dct_adamw"))
    return [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in every]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(
    ("strategy", "optimizer"), cases(("ddp", "dct_adamw"), ("fsdp", "adamw"), ("zero2", "dct_adamw"))
)
def test_the_peak_of_a_step_is_the_allocators_and_causes_explain_it(
    text: str, tmp_path: Path, strategy: str, optimizer: str
) -> None:
    """Measured: 0.02 to 0.04 % more than the allocator (the batch, which numpy allocates), residual below 0.003 %.

    In a group that sends nothing, but for DDP, which is not for such a group and here has one rank: gloo allocates
    copies of its own and frees them in threads that the profiler does not follow.
    """
    alone = strategy == "ddp"
    told: list[tuple[int, dict[str, int]]] = []
    for attempt in range(5 if alone else 1):  # frees that the profiler misses only add: the least of some runs counts
        runs = tmp_path / str(attempt)
        runs.mkdir()
        folder, ranks = _folder(text, runs, strategy, optimizer)
        arguments = (folder, 1 if alone else ranks)
        ((said, allocated_bytes),) = run_on_ranks(
            1, _train_profiled, *arguments, distributed=alone, timeout_seconds=100
        )
        told.append((allocated_bytes, said))
        if allocated_bytes <= 1.005 * _at_peak(said)[1]:
            break
    allocated_bytes, said = min(told, key=lambda each: each[0])
    by_cause, total_bytes = _at_peak(said)
    print(
        f"{total_bytes / allocated_bytes - 1:.3%} beside the allocator, {by_cause['residual'] / total_bytes:.4%} left"
    )
    assert total_bytes == pytest.approx(allocated_bytes, rel=0.005)
    assert sum(by_cause.values()) == total_bytes
    assert 0 <= by_cause["residual"] < 0.005 * total_bytes


@pytest.mark.parametrize(("strategy", "optimizer"), cases(("fsdp", "dct_adamw")))
def test_ranks_that_train_together_explain_their_memory(
    text: str, tmp_path: Path, strategy: str, optimizer: str
) -> None:
    folder, ranks = _folder(text, tmp_path, strategy, optimizer)
    for said, state_bytes, reached_bytes in run_on_ranks(ranks, _train, folder, ranks, timeout_seconds=100):
        by_cause, total_bytes = _at_peak(said)
        assert sum(by_cause.values()) == total_bytes
        assert 0 <= by_cause["residual"] < 0.005 * total_bytes
        assert state_bytes == reached_bytes > 0
        assert (said["memory_bytes/refresh_workspace"] > 0) == (optimizer == "dct_adamw")
        assert (said["memory_bytes/gathered_parameters"] > 0) == (strategy in ("fsdp", "hsdp", "zero3"))
        assert said["memory_bytes/collective_buffers"] > 0


def test_copies_for_checkpoints_and_buckets_that_are_never_sent_are_explained(text: str, tmp_path: Path) -> None:
    more = ["strategy.low_rank_gradients=true", "optimizer.refresh_interval=4", "checkpoint.interval_steps=1"]
    folder = folder_of([*_overrides(text, tmp_path, "ddp", "galore"), *more])
    told = [_at_peak(said) for said, *_ in run_on_ranks(2, _train, folder, 2, timeout_seconds=100)]
    for by_cause, total_bytes in told:
        assert 0 <= by_cause["residual"] < 0.005 * total_bytes
        assert by_cause["collective_buffers"] >= by_cause["parameters"]
    copied_bytes, moments_bytes = (sum(held[cause] for held, _ in told) for cause in ("checkpoint_copy", "moments"))
    copies = ("parameters", "projection", "dense_moments", "other_state")  # of which one rank saves each
    saved_bytes = moments_bytes + sum(told[0][0][cause] for cause in copies)
    assert saved_bytes < copied_bytes < saved_bytes + 2 * 16_000  # and random states


def test_a_run_that_is_not_asked_tracks_nothing(text: str, tmp_path: Path) -> None:
    folder = folder_of(overrides_for(text, tmp_path, "strategy=ddp", "train.steps=1"))
    ((said, *_),) = run_on_ranks(1, _train, folder, 1)
    assert not any(tag.startswith(tags.memory_at_peak_bytes("")) for tag in said)
