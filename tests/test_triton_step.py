"""DCT-AdamW's whole step in Triton's kernels is its step in torch; on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton", reason="triton is not installed (`make test-triton` brings it)")

from processes import run_on_ranks  # noqa: E402
from sharded_models import Model, full, gradients, placed_as, shard  # noqa: E402
from torch import Tensor  # noqa: E402

from dist_lowrank.kernels import triton_step  # noqa: E402
from dist_lowrank.optim import DCTAdamW  # noqa: E402

SHAPES: dict[str, tuple[int, ...]] = {
    "tall": (70, 20),
    "wide": (20, 40),
    "square": (16, 16),
    "one": (1, 8),
    "norm": (9,),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "refreshing every third step": {"refresh_interval": 3, "weight_decay": 0.1},
    "always refreshing, reset": {"transition": "reset", "dictionary": "hadamard", "rank": 4},
    "moments bf16": {"refresh_interval": 2, "moment_dtype": torch.bfloat16, "betas": (0.9, 0.95)},
    "staggered": {"refresh_interval": 3, "refresh_stagger": True, "rank": 1.0, "dictionary": "random"},
}
STEPS = 7
# Triton's interpreter multiplies the bits of bfloat16 as integers.
ON_A_GPU = {"operands bf16": {"refresh_interval": 2, "transform_precision": "bf16"}}


def _trained(
    rank: int, kernels: str, dtype: torch.dtype, options: dict[str, Any], layout: str = "ddp", world_size: int = 1
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], list[str]]:
    """Full weights and columns after each step, and the kernels that steps took."""
    shapes = {f"{name}.weight": shape for name, shape in SHAPES.items()}
    model = Model(shapes, dtype).to(DEVICE)
    shard(model, layout, world_size, options.get("rank", 0.25))
    updater = DCTAdamW(model.named_parameters(), lr=0.01, kernels=kernels, **options)
    weights, indices, taken = [], [], []
    originals = {name: getattr(triton_step, name) for name in ("column_energy", "project_and_direct", "lift_into")}

    def told(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            taken.append(name)
            return originals[name](*arguments, **options)

        return call

    for name in originals:
        setattr(triton_step, name, told(name))
    try:
        for step in range(1, STEPS + 1):
            for name, gradient in gradients(step, shapes, torch.float64).items():
                parameter = model.get_parameter(name)
                parameter.grad = placed_as(parameter, gradient.to(DEVICE, dtype))
            updater.step()
            weights.append({name: full(p) for name, p in model.named_parameters()})
            chosen = [(m.name, m.state(updater.state[m.parameter])["indices"]) for m in updater._matrices()]
            indices.append({name: columns.clone() for name, columns in chosen})
    finally:
        for name, original in originals.items():
            setattr(triton_step, name, original)
    return weights, indices, taken


def _assert_same(found: Any, expected: Any, tolerance: float) -> None:
    for step, (one, other) in enumerate(zip(found[1], expected[1], strict=True), start=1):
        assert all(torch.equal(one[name], other[name]) for name in other), step
    for one, other in zip(found[0], expected[0], strict=True):
        for name in other:
            torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [*OPTIONS, *(pytest.param(each, marks=pytest.mark.gpu) for each in ON_A_GPU)])
def test_steps_in_kernels_are_those_in_torch(options: str, dtype: torch.dtype) -> None:
    chosen = (OPTIONS | ON_A_GPU)[options]
    found, expected = (_trained(0, kernels, dtype, chosen) for kernels in ("triton", "torch"))
    # The interpreter cuts bfloat16 off where a GPU rounds.
    narrow = dtype == torch.bfloat16 or torch.bfloat16 in chosen.values() or "bf16" in chosen.values()
    _assert_same(found, expected, 2e-2 if narrow else 1e-5)
    matrices = sum(len(shape) == 2 for shape in SHAPES.values())
    refreshes = found[2].count("column_energy")
    assert found[2].count("project_and_direct") == found[2].count("lift_into") == STEPS * matrices
    assert (refreshes == STEPS * matrices) == ("refresh_interval" not in chosen)
    assert refreshes > 0
    assert expected[2] == []


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "fsdp_rows"])
def test_two_ranks_in_kernels_follow_one_process_in_torch(layout: str) -> None:
    options = OPTIONS["refreshing every third step"]
    expected = _trained(0, "torch", torch.float32, options)
    for found in run_on_ranks(2, _trained, "triton", torch.float32, options, layout, 2):
        _assert_same(found, expected, 1e-5)
        assert "column_energy" in found[2]
