"""Adafactor, CAME and AdamW8bit take the steps of other packages, in what they have in common.

Of SMMF and SCALE no maintained package has the rule: pytorch-optimizer 4.1 has neither.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_optimizer
import torch
import transformers
from references import initial_weight, prescribed_gradients
from torch import Tensor, nn

from dist_lowrank.optim import CAME, Adafactor, AdamW8bit
from dist_lowrank.optim.quantization import dynamic_values

STEPS = 20
SHAPES = [(14, 6), (8, 12), (9, 9)]


def weights(shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(initial_weight(shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]


def feed(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], step: int) -> None:
    for index, p in enumerate(parameters):
        p.grad = prescribed_gradients(tuple(p.shape), STEPS, seed=index)[step].to(p.dtype)
    optimizer.step()


def assert_same_steps(ours: Any, theirs: Any, mine: list[nn.Parameter], other: list[nn.Parameter], tol: float) -> None:
    for step in range(STEPS):
        feed(ours, mine, step)
        feed(theirs, other, step)
        for p, q in zip(mine, other, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=tol)


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_adafactor_is_that_of_transformers_at_a_given_rate(beta1: float | None) -> None:
    mine, other = weights(SHAPES), weights(SHAPES)
    shared = {"lr": 0.02, "weight_decay": 0.1, "beta1": beta1, "clip_threshold": 0.7}
    theirs = transformers.Adafactor(other, **shared, relative_step=False, scale_parameter=False)
    assert_same_steps(Adafactor(mine, **shared), theirs, mine, other, 1e-12)


def test_adafactor_is_that_of_torch_at_the_rate_that_torch_makes_of_the_weights() -> None:
    """torch has no eps in the means but bounds their product from below, which gradients of ordinary size do not
    reach, and multiplies `min(lr, 1 / sqrt(t))` by the root mean square of the weights."""
    mine, other = weights(SHAPES), weights(SHAPES)
    theirs = torch.optim.Adafactor(other, lr=0.02, weight_decay=0.0, beta2_decay=-0.8, d=1.0)
    ours = Adafactor([{"params": [p]} for p in mine])
    for step in range(STEPS):
        for group in ours.param_groups:
            size = float(group["params"][0].detach().square().mean().sqrt())
            group["lr"] = max(1e-3, size) * min(0.02, 1 / math.sqrt(step + 1))
        feed(ours, mine, step)
        feed(theirs, other, step)
        for p, q in zip(mine, other, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_came_is_that_of_pytorch_optimizer() -> None:
    mine, other = weights(SHAPES), weights(SHAPES)
    shared: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95, 0.995), "weight_decay": 0.1}
    theirs = pytorch_optimizer.CAME(other, **shared)
    assert_same_steps(CAME(mine, **shared), theirs, mine, other, 1e-12)


@pytest.mark.slow
def test_adamw8bit_is_that_of_torchao_where_rows_are_whole_blocks() -> None:
    """torchao is not among the development dependencies: where it is installed, transformers imports it in every
    process that builds a model. `make test-torchao` runs this test."""
    torchao = pytest.importorskip("torchao.optim")
    from torchao.optim.quant_utils import create_dynamic_map

    for signed in (True, False):
        theirs_map = torch.tensor(create_dynamic_map(signed))
        torch.testing.assert_close(dynamic_values(signed, theirs_map.device), theirs_map, rtol=1e-6, atol=0)
    shapes = [(16, 512), (5, 1024), (3, 256)]  # the last below the least size
    mine, other = weights(shapes, torch.float32), weights(shapes, torch.float32)
    ours, theirs = AdamW8bit(mine, lr=0.02), torchao.AdamW8bit(other, lr=0.02)
    with torch.compiler.set_stance("force_eager"):
        for step in range(STEPS):
            feed(ours, mine, step)
            feed(theirs, other, step)
    assert ours.state[mine[0]]["exp_avg"].dtype == torch.uint8
    codes: Tensor = theirs.state[other[0]]["exp_avg"].codes
    assert (ours.state[mine[0]]["exp_avg"] != codes).float().mean() < 1e-3  # on the border between two codes
    for p, q, start in zip(mine, other, weights(shapes, torch.float32), strict=True):
        moved = (q.detach() - start.detach()).abs().mean()
        assert (p.detach() - q.detach()).abs().mean() < 1e-4 * moved
        assert ((p.detach() - q.detach()).abs() > 1e-5).float().mean() < 1e-3
