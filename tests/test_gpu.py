"""What only a GPU can show: the same columns as on a CPU, ties included, and several devices in one process."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from trajectories import (
    MIXED_SHAPES,
    assert_bitwise_equal,
    both,
    each,
    feed,
    make,
    make_gradients,
    make_parameters,
    train,
)

from dist_lowrank.optim import DCTAdamW
from dist_lowrank.subspaces import top_columns
from dist_lowrank.telemetry.memory import memory_by_cause, model_tensors, state_tensors
from dist_lowrank.telemetry.memory_tracker import MemoryTracker
from dist_lowrank.telemetry.profiling import OutOfMemory, Profiler, memory_watched

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
MATRICES = [(48, 32), (32, 48), (40, 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 5, 257, 4096])
def test_ties_go_to_the_lowest_index_on_a_gpu(n: int, dtype: torch.dtype) -> None:
    rank = (n + 2) // 3
    assert top_columns(torch.ones(n, dtype=dtype, device=GPU), rank).tolist() == list(range(rank))
    scores = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(n)).to(dtype)  # ties everywhere
    assert top_columns(scores.to(GPU), rank).tolist() == top_columns(scores, rank).tolist()


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gpu_chooses_the_columns_of_a_cpu_and_follows_its_trajectory(kind: str, dtype: torch.dtype) -> None:
    here = make_parameters(MATRICES, dtype)
    there = [Parameter(p.detach().to(GPU)) for p in here]
    of_here, of_there = make(kind, here), make(kind, there)
    for gradients in make_gradients(MATRICES, 10):
        feed(of_here, here, gradients)
        feed(of_there, there, [gradient.to(GPU) for gradient in gradients])
        for p, q in zip(here, there, strict=True):
            if "indices" in of_here.state[p]:
                assert torch.equal(of_there.state[q]["indices"].cpu(), of_here.state[p]["indices"])
            tolerance = 1e-10 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=0, atol=tolerance)


@each
def test_the_same_run_twice_is_bitwise_equal_on_a_gpu(kind: str) -> None:
    results = []
    for _ in range(2):
        parameters = [Parameter(p.detach().to(GPU)) for p in make_parameters(MIXED_SHAPES, torch.float32)]
        optimizer = make(kind, parameters)
        for gradients in make_gradients(MIXED_SHAPES, 5):
            feed(optimizer, parameters, [gradient.to(GPU) for gradient in gradients])
        results.append([p.detach() for p in parameters])
    assert_bitwise_equal(*results)


@both
def test_two_devices_in_one_optimizer_update_each_parameter_where_it_lies(kind: str) -> None:
    parameters = make_parameters(MIXED_SHAPES)
    mixed = [Parameter(p.detach().to(GPU if i % 2 else "cpu")) for i, p in enumerate(parameters)]
    of_one, of_two = make(kind, parameters), make(kind, mixed)
    for gradients in make_gradients(MIXED_SHAPES, 5):
        feed(of_one, parameters, gradients)
        feed(of_two, mixed, [g.to(p.device) for g, p in zip(gradients, mixed, strict=True)])
    for one, two in zip(parameters, mixed, strict=True):
        torch.testing.assert_close(two.detach().cpu(), one.detach(), rtol=0, atol=1e-10)


@both
def test_a_state_moves_from_a_cpu_to_a_gpu(kind: str) -> None:
    here = make_parameters(MIXED_SHAPES)
    of_here = make(kind, here)
    train(of_here, here, steps=4)
    there = [Parameter(p.detach().to(GPU)) for p in here]
    of_there = make(kind, there)
    of_there.load_state_dict(of_here.state_dict())
    for gradients in make_gradients(MIXED_SHAPES, 8)[4:]:
        feed(of_here, here, gradients)
        feed(of_there, there, [gradient.to(GPU) for gradient in gradients])
    for p, q in zip(here, there, strict=True):
        torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=0, atol=1e-10)


def test_running_out_of_memory_writes_a_snapshot_that_the_error_names(tmp_path: Path) -> None:
    held = []

    def too_much() -> None:
        with memory_watched(tmp_path, 3, GPU, history=True):
            held.append(torch.ones(1024, device=GPU))
            torch.empty(2**50, dtype=torch.uint8, device=GPU)

    with pytest.raises(OutOfMemory) as raised:
        too_much()
    path = tmp_path / "rank3_out_of_memory.pickle"
    assert str(path) in str(raised.value)
    assert "rank 3: CUDA out of memory" in str(raised.value)
    assert path.read_bytes().count(b"test_gpu.py")  # the line that allocated


def test_a_profile_on_a_gpu_has_kernels_and_a_snapshot_of_the_memory(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, 0, GPU, (1, 2), None)
    for step in (1, 2, 3):
        with profiler.traced(step):
            torch.ones(64, 64, device=GPU) @ torch.ones(64, 64, device=GPU)
    folder = tmp_path / "steps_1_to_2"
    with gzip.open(folder / "rank0_trace.json.gz") as file:
        assert "kernel" in {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert (folder / "rank0_memory.pickle").stat().st_size > 0


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, DCTAdamW])
def test_causes_explain_what_the_allocator_has_given_out_at_the_peak_of_a_step(optimizer: Any) -> None:
    """The tracker's peak is the allocator's; it cannot name roundings to 512 bytes and operators' scratch."""
    width = 1024
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(width, width), torch.nn.GELU())]
    model = torch.nn.Sequential(*layers).to(GPU)
    updater = optimizer(model.parameters())

    def held() -> dict[str, list[torch.Tensor]]:
        return {**model_tensors(model), **state_tensors(updater)}

    def step() -> None:
        model(torch.ones(2048, width, device=GPU)).square().mean().backward()
        updater.step()
        updater.zero_grad()

    step()
    torch.cuda.reset_peak_memory_stats()
    with MemoryTracker(model, updater, held, torch.device("cuda", torch.cuda.current_device())) as tracker:
        step()
    told = tracker.told()
    print(f"{told.total_bytes} of {torch.cuda.max_memory_allocated()}: {dict(told.at_peak)}")
    assert told.total_bytes == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.02)
    assert sum(told.at_peak.values()) == told.total_bytes
    assert abs(told.at_peak["residual"]) < 0.05 * told.total_bytes
    assert told.at_peak["parameters"] == 4 * 4 * (width * width + width)
    assert told.most["activations"] >= 4 * 4 * 2048 * width
    by_cause = memory_by_cause(model, updater)
    assert min(by_cause["fragmentation"], by_cause["outside_allocator"]) >= 0
    assert by_cause["allocator_peak"] == torch.cuda.max_memory_allocated()
