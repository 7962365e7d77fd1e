"""Real DeepSpeed, ZeRO stages 0 to 3: the one-process trajectory, or a refusal; never something else."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from deepspeed_runs import KINDS, SHAPES, Model, configuration, feed, gradients_of, make_optimizer, start_bound, weights_of
from processes import run_on_ranks
from torch import Tensor

from dist_lowrank.optim import param_groups

STEPS = 20


@cache
def one_process(kind: str, steps: int = STEPS, clip: float = 0.0) -> dict[str, Tensor]:
    """Where our optimizer takes the model without DeepSpeed, which other tests compare with the references."""
    model = Model()
    optimizer = make_optimizer(kind, param_groups(model))
    for gradients in gradients_of(steps):
        for module, gradient in zip(model.weights.values(), gradients, strict=True):
            module.weight.grad = gradient.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {name: module.weight.detach() for name, module in model.weights.items()}


def _trajectory(rank: int, config: dict[str, Any], kind: str, steps: int = STEPS) -> dict[str, Any]:
    engine = start_bound(config, kind)
    for gradients in gradients_of(steps):
        feed(engine, gradients)
    return {"weights": weights_of(engine), "layout": layout_of(engine)}


def layout_of(engine: Any) -> dict[str, Any]:
    """Which elements of which matrix this rank has, and how much padding."""
    runs, padding = {}, 0
    for tensor, place in engine.basic_optimizer._flat.items():
        own = {part.name: part.slices[place.group.rank()] for part in place.parts}
        runs |= {name: (run.start, run.stop) for name, run in own.items()}
        padding += tensor.numel() - sum(run.stop - run.start for run in own.values())
    return {"runs": runs, "padding": padding}


def assert_cut_badly(layouts: list[dict[str, Any]]) -> None:
    """A matrix is cut inside a row, a rank holds nothing of a matrix, and there is padding."""
    matrices = {f"weights.{name}.weight": shape for name, shape in SHAPES.items() if len(shape) == 2}
    runs = [(name, *layout["runs"][name]) for layout in layouts for name in matrices]
    assert any(0 < begin < end and begin % matrices[name][1] for name, begin, end in runs)
    assert any(begin == end for _, begin, end in runs)
    assert any(layout["padding"] for layout in layouts)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name].to(weight.dtype), atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_follows_the_one_process_trajectory(stage: int, world_size: int, kind: str) -> None:
    results = run_on_ranks(world_size, _trajectory, configuration(stage), kind)
    for result in results:
        assert_same(result["weights"], one_process(kind))
    if stage > 0 and world_size > 1:
        assert_cut_badly([result["layout"] for result in results])
