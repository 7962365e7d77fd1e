"""Matrix products of a step, by the library that is fast on this machine.

torch hands float32 products on a CPU to MKL, which on AMD's processors leaves half of their vector width unused:
90 GFLOP/s on a core where oneDNN, which torch has for its compiler, reaches 220. The choice depends on the processor
and on shapes alone, never on a measurement nor on the number of rows: ranks and runs on like machines round alike, and
so do the same rows on other numbers of ranks.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**19  # of a product that is added to something, at once: what caches hold
_LEAST_ELEMENTS = 2**12  # of the right factor; below, the call costs more than it saves


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, (m, k) by (k, n) to (m, n), any strides; the result may be the transpose of a contiguous tensor."""
    if not _by_onednn(a, b):
        return a @ b
    if a.stride(0) < a.stride(1):  # as rows of the left side lie
        return _linear(b.t().contiguous(), a).t()
    return _linear(a.contiguous(), b.t())


def add_product(target: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float) -> None:
    """In place: `target = beta * target + alpha * a @ b`, (m, k) by (k, n) to (m, n), any strides."""
    if not _by_onednn(a, b):
        target.addmm_(a, b, beta=beta, alpha=alpha)
        return
    if target.stride(0) < target.stride(1):
        target, a, b = target.t(), b.t(), a.t()
    rows, columns = target.shape
    blocks = -(-rows * columns // BLOCK_ELEMENTS)
    size = -(-rows // blocks)
    a, b = a.contiguous() * alpha, b.t()  # so that one pass over the target does the rest
    for start in range(0, rows, size):
        part = target[start : start + size]
        torch.add(_linear(a[start : start + size], b), part, alpha=beta, out=part)


def _linear(x: Tensor, w: Tensor) -> Tensor:
    """`x @ w^T`, (m, k) by (n, k) to (m, n); x contiguous."""
    if not (w.is_contiguous() or w.t().is_contiguous()):
        # oneDNN has kernels for these two, and for gaps between rows one that is slower by thousands.
        w = w.t().contiguous().t() if w.stride(0) < w.stride(1) else w.contiguous()
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, w, None, "none", [], "")
    return result


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and b.numel() >= _LEAST_ELEMENTS
        and a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and type(a) is Tensor  # not one without values, as in planning
        and len(a) > 0
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
        and onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is a processor of AMD with AVX-512, which MKL does not use there, and torch has both libraries."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not both or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
