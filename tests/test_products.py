"""Products of a step: the same numbers from either library, for any strides, and for any number of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_lowrank.kernels import products
from dist_lowrank.kernels.products import add_product, product

LAYOUTS = ("contiguous", "transposed", "gaps between rows", "transposed, with gaps")
LIBRARIES = ("torch's", "onednn")
CHOSEN_HERE = products.onednn_is_faster()


@pytest.fixture(autouse=True, params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either library, whichever this machine would take, and for small factors too."""
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param == "onednn")
    monkeypatch.setattr(products, "_LEAST_ELEMENTS", 1)
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 1000)
    return str(request.param)


def laid_out(rows: int, columns: int, layout: str, seed: int) -> Tensor:
    if layout.startswith("transposed"):
        return laid_out(columns, rows, "gaps between rows" if "gaps" in layout else "contiguous", seed).t()
    extra = 3 if "gaps" in layout else 0
    values = torch.randn(rows, columns + extra, generator=torch.Generator().manual_seed(seed))
    return values[:, extra : extra + columns]


sizes, layouts = st.integers(1, 80), st.sampled_from(LAYOUTS)


# The fixture need not be set up again for each example.
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(0, 8, 9, ("contiguous",) * 3)
@example(40, 1, 1, ("transposed",) * 3)
@example(1, 70, 70, ("transposed", "transposed", "contiguous"))
@given(st.integers(0, 80), sizes, sizes, st.tuples(layouts, layouts, layouts))
def test_both_agree_with_float64(library: str, m: int, k: int, n: int, of: tuple[str, str, str]) -> None:
    a, b, target = laid_out(m, k, of[0], 1), laid_out(k, n, of[1], 2), laid_out(m, n, of[2], 3)
    exact = a.double() @ b.double()
    torch.testing.assert_close(product(a, b).double(), exact, atol=1e-4, rtol=0)
    for beta in (1.0, 0.75):
        expected = beta * target.double() - 0.5 * exact
        add_product(target, a, b, beta=beta, alpha=-0.5)
        torch.testing.assert_close(target.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(not CHOSEN_HERE, reason="this machine takes torch's products, which do not promise it")
@pytest.mark.parametrize("library", ["onednn"], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_row_is_the_same_with_any_rows_beside_it(library: str, layout: str) -> None:
    a, b = laid_out(300, 96, layout, 1), laid_out(24, 96, "contiguous", 2).t()
    whole, lifted = product(a, b), torch.zeros(300, 96)
    add_product(lifted, whole, b.t(), beta=1, alpha=1)
    for start, stop in ((0, 299), (0, 150), (150, 300), (17, 64), (120, 130)):
        part, lifted_part = product(a[start:stop], b), torch.zeros(stop - start, 96)
        assert torch.equal(part, whole[start:stop])
        add_product(lifted_part, part, b.t(), beta=1, alpha=1)
        assert torch.equal(lifted_part, lifted[start:stop])


def test_repeats_to_the_bit() -> None:
    a, b = laid_out(200, 96, "contiguous", 1), laid_out(96, 96, "contiguous", 2)
    assert all(torch.equal(product(a, b), product(a, b)) for _ in range(5))


def test_factors_are_not_modified() -> None:
    a, b = laid_out(50, 40, "transposed", 1), laid_out(40, 30, "contiguous", 2)
    before = a.clone(), b.clone()
    product(a, b)
    add_product(torch.zeros(50, 30), a, b, beta=0.5, alpha=2)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_what_onednn_has_no_kernel_for_goes_to_torch() -> None:
    a, b = laid_out(70, 90, "contiguous", 1), laid_out(90, 80, "contiguous", 2)
    torch.testing.assert_close(product(a.double(), b.double()), a.double() @ b.double(), atol=0, rtol=0)
    torch.testing.assert_close(product(a.bfloat16(), b.bfloat16()), a.bfloat16() @ b.bfloat16(), atol=0, rtol=0)
    assert product(a.to("meta"), b.to("meta")).shape == (70, 80)
    leaf = a.clone().requires_grad_()
    product(leaf, b).sum().backward()
    torch.testing.assert_close(leaf.grad, b.sum(dim=1).expand(70, 90))
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert torch.equal(compiled(a, b), a @ b)
