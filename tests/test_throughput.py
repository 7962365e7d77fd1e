"""Tokens, FLOPs and time per step."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from dist_lowrank.telemetry.throughput import (
    StepTimer,
    dense_transformer_flops_per_token,
    matmul_parameter_count,
    model_flops_per_token,
    peak_flops_per_second,
)


class Transformer(nn.Module):
    """An embedding of 10 x 4, a 4 x 4 matrix and a head of 10 x 4, tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.matrix = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.matrix(self.embedding(tokens)))


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_counts_as_multiplied_and_the_input_embedding_does_not(tied: bool) -> None:
    assert matmul_parameter_count(Transformer(tied)) == 4 * 4 + 10 * 4


def test_flops_follow_the_formula_of_palm() -> None:
    assert dense_transformer_flops_per_token(1000, layers=2, attention_width=8, sequence_length=16) == 6000 + 3072


def test_flops_of_a_transformers_model_use_its_heads_not_its_hidden_size() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    layer = 16 * 8 + 2 * 16 * 4 + 8 * 16 + 3 * 16 * 24 + 2 * 16  # q, k and v, o, MLP, norms
    multiplied = 3 * layer + 16 + 50 * 16
    assert model_flops_per_token(LlamaForCausalLM(config), 32) == 6 * multiplied + 12 * 3 * 8 * 32


def test_flops_of_a_mixture_of_experts_are_unknown() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    assert model_flops_per_token(MixtralForCausalLM(config), 32) is None


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "tf32", 494.5),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GB200", "bf16", None),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp64", None),
    ],
)
def test_peak_is_the_dense_figure_of_exactly_that_gpu(name: str, dtype: str, teraflops: float | None) -> None:
    assert peak_flops_per_second(name, dtype) == (None if teraflops is None else teraflops * 1e12)


def test_step_timer_splits_the_optimizer_off_and_leaves_pauses_out() -> None:
    started = time.perf_counter()
    timer = StepTimer(torch.device("cpu"))
    for _ in range(3):
        time.sleep(0.01)
        with timer.optimizer():
            time.sleep(0.02)
        timer.end_step(100)
    with timer.paused():
        time.sleep(0.3)
    times = timer.read()
    elapsed = time.perf_counter() - started
    assert (times.steps, times.tokens) == (3, 300)
    assert 0.06 <= times.optimizer_seconds <= times.seconds - 0.03
    assert 0.09 <= times.seconds <= elapsed - 0.3
    assert times.optimizer_milliseconds == pytest.approx(1000 * times.optimizer_seconds / 3)
    assert times.optimizer_share == times.optimizer_seconds / times.seconds
    assert times.tokens_per_second == 300 / times.seconds
    with pytest.raises(RuntimeError, match="no step"):
        timer.read()  # the interval is fresh


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_timer_sees_the_time_that_the_gpu_takes_in_the_optimizer() -> None:
    matrix = torch.randn(8192, 8192, device="cuda")
    matrix @ matrix
    torch.cuda.synchronize()
    timer = StepTimer(torch.device("cuda"))
    started = time.perf_counter()
    with timer.optimizer():
        for _ in range(20):
            matrix @ matrix
    timer.end_step(1)
    launched_seconds = time.perf_counter() - started
    times = timer.read()
    assert launched_seconds < times.optimizer_seconds <= times.seconds
