"""Models whose weights are in float64 compute in float64 throughout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import overrides_for

from dist_lowrank.config import compose
from dist_lowrank.training.evaluate import next_token_loss
from dist_lowrank.training.model import build_model

HEADS = ["+model.config.num_key_value_heads=3", "+model.config.head_dim=4"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "olmo2"])
def test_a_gradient_of_a_third_of_the_loss_is_a_third_to_the_last_digits(
    text: str, tmp_path: Path, architecture: str, attention: str
) -> None:
    more = ["precision=fp64", f"model.architecture={architecture}", f"model.attention={attention}"]
    if architecture in ("qwen3", "gemma"):
        more += HEADS
    model = build_model(compose(overrides_for(text, tmp_path, *more)))
    tokens = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for share in (1.0, 1 / 3):  # not a power of two, by which float32 would round alike
        loss = next_token_loss(model, tokens)
        assert loss.dtype == torch.float64
        parameters = list(model.parameters())
        gradients.append([each / share for each in torch.autograd.grad(loss * share, parameters)])
    for whole, third in zip(*gradients, strict=True):
        torch.testing.assert_close(third, whole, atol=1e-14, rtol=1e-12)
