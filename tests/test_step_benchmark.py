"""`benchmarks/optimizer_step.py` runs, with every contender that is installed."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "optimizer_step.py"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_short_form_times_every_contender_beside_its_bounds(dtype: str) -> None:
    script = runpy.run_path(str(SCRIPT))
    text = script["main"](["--short", "--dtype", dtype, "--clock", "processor"])
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    shapes, device = script["matrices"]("tiny", None), torch.device("cpu")
    names = [each.name for each in script["contenders"](shapes, getattr(torch, dtype), device)]
    assert any("bf16 operands" in name for name in names) == (dtype == "bfloat16")
    assert set(names) <= set(lines)
    for name in names:
        if "torchao" in name and importlib.util.find_spec("torchao") is None:
            assert "not installed" in lines[name][1]
        else:
            assert float(lines[name][1]) > 0
    assert float(lines["the two products, n/4"][4]) == 1  # of themselves
    assert float(lines["DCTAdamW n/4"][4]) > 0


def test_tables_go_between_the_comments_of_their_dtype_and_device() -> None:
    script = runpy.run_path(str(SCRIPT))
    place = "<!-- optimizer step, cpu, float32: written by --write -->"
    text = f"before\n{place}\nold\n<!-- end -->\nafter\n<!-- end -->"
    written = script["with_tables"](text, ["new"], "float32", torch.device("cpu"))
    assert written == f"before\n{place}\n\nnew\n\n<!-- end -->\nafter\n<!-- end -->"
    with pytest.raises(ValueError, match="no place"):
        script["with_tables"](text, ["new"], "bfloat16", torch.device("cpu"))
