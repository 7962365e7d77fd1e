"""The benchmarks behind docs/speed.md run in their short form, and their tables go where they belong."""

from __future__ import annotations

import importlib
import importlib.util
import math
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
KEPT_APART = ("torchao", "galore_torch", "apollo_torch")  # `make step-benchmark` installs them


@pytest.fixture(autouse=True)
def _benchmarks_import_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_short_form_times_every_contender_beside_its_bounds(dtype: str) -> None:
    script = importlib.import_module("optimizer_step")
    text = script.main(["--short", "--dtype", dtype, "--clock", "processor"])
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    shapes, device = script.matrices("tiny", None), torch.device("cpu")
    names = [each.name for each in script.contenders(shapes, getattr(torch, dtype), device)]
    assert any("bf16 operands" in name for name in names) == (dtype == "bfloat16")
    assert set(names) <= set(lines)
    for name in names:
        package = name.partition(" ")[0].replace("-", "_")
        if package in KEPT_APART and importlib.util.find_spec(package) is None:
            assert "not installed" in lines[name][1]
        else:
            assert float(lines[name][1]) > 0
    for name in ("the two products, n/4", "the same by torch's mm and addmm_, n/4", "DCTAdamW n/4"):
        assert all(float(cell) > 0 for cell in lines[name][4:6])  # of the products by our library, and by torch's own


def test_a_table_goes_between_the_comments_of_its_name() -> None:
    with_table = importlib.import_module("measuring").with_table
    place = "<!-- scaling: written by --write -->"
    text = f"before\n{place}\nold\n<!-- end -->\nafter\n<!-- end -->"
    assert with_table(text, "scaling", "new") == f"before\n{place}\n\nnew\n\n<!-- end -->\nafter\n<!-- end -->"
    with pytest.raises(ValueError, match="no place"):
        with_table(text, "collectives", "new")


def test_bytes_on_the_wire_are_those_declared_and_gradients_between_refreshes_r_of_n() -> None:
    """The script ends with an error where they are not; on 2 and 4 processes."""
    text = importlib.import_module("step_collectives").main(["--short"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    gradients = {row[2]: row for row in rows if row[3] == "gradients" and row[-2]}
    assert [row[0] for row in rows if row[0].isdigit()] == ["4", "2", "2"]
    assert float(gradients["refresh"][-2]) == 1
    assert float(gradients["between refreshes"][-2]) == 0.25
    assert float(gradients["refresh"][-1]) < 1e-10  # weights, from those of whole gradients
    assert float(gradients["every step"][-2]) > 0.25  # scores beside coefficients


def test_the_short_form_of_scaling_counts_bytes_and_fits_exponents() -> None:
    text = importlib.import_module("scaling").main(["--short", "--clock", "processor"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    exponents = next(row[2:] for row in rows if row[0] == "exponent")
    assert len(exponents) == 5
    assert all(map(math.isfinite, map(float, exponents)))
    sent = {(row[1], row[2]): int(row[-1].replace(",", "")) for row in rows if row[0] == "refresh"}
    assert sent["wider", "1"] == sent["deeper", "1"] == 0  # with no one to send to
    assert sent["wider", "2"] == 4 * 2 * 7 * 64  # 4 bytes, 2 layers, 7 matrices, n = 64
    assert sent["deeper", "2"] == 2 * sent["wider", "2"]


def test_the_short_form_of_whole_steps_tells_tokens_and_the_part_of_the_optimizer() -> None:
    text = importlib.import_module("end_to_end").main(["--short", "--clock", "processor"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    figures = {row[0]: [float(cell.replace(",", "")) for cell in row[1:]] for row in rows[2:]}
    assert set(figures) == {"AdamW, fused", "DCT-AdamW"}
    for tokens_per_second, milliseconds, _, optimizer, _, percent, _ in figures.values():
        assert tokens_per_second == pytest.approx(16 * 32 / milliseconds * 1e3, rel=0.01)
        assert 0 < optimizer < milliseconds
        assert 0 < percent < 100
    assert figures["AdamW, fused"][-1] == 1
