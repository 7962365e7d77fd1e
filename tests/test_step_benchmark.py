"""The benchmarks behind docs/speed.md run in their short form, and their tables go where they belong."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_import_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def _script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / f"{name}.py"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_short_form_times_every_contender_beside_its_bounds(dtype: str) -> None:
    script = _script("optimizer_step")
    text = script["main"](["--short", "--dtype", dtype, "--clock", "processor"])
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    names = [each.name for each in script["contenders"](script["matrices"]("tiny", None), torch.float32)]
    assert set(names) <= set(lines)
    for name in names:
        if "torchao" in name and importlib.util.find_spec("torchao") is None:
            assert "not installed" in lines[name][1]
        else:
            assert float(lines[name][1]) > 0
    assert float(lines["the two products, n/4"][4]) == 1  # of themselves
    assert float(lines["DCTAdamW n/4"][4]) > 0


def test_a_table_goes_between_the_comments_of_its_name() -> None:
    with_table = _script("measuring")["with_table"]
    place = "<!-- scaling: written by --write -->"
    text = f"before\n{place}\nold\n<!-- end -->\nafter\n<!-- end -->"
    assert with_table(text, "scaling", "new") == f"before\n{place}\n\nnew\n\n<!-- end -->\nafter\n<!-- end -->"
    with pytest.raises(ValueError, match="no place"):
        with_table(text, "collectives", "new")
