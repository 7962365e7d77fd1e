"""Products of rows with a whole dictionary in O(n log n) each, without its matrix.

The cosine transforms follow Makhoul (IEEE Trans. ASSP 28(1), 1980): one real FFT of the same length n, any n, of the
row with its even entries in front and its odd ones reversed behind. On a CPU scipy's own fast DCT does the same up to
twice as fast on one thread, where scipy is installed. Hadamard's is the butterfly, block by block.
`benchmarks/transform.py` times them.

All work on blocks of rows, so that temporaries stay small whatever the number of rows.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Dictionaries that have one; the identity needs none and a random matrix has none.
FAST_TRANSFORMS = ("dct2", "dct3", "hadamard")

_BLOCK_ELEMENTS = {"cpu": 2**18}  # of the rows transformed at once; on a CPU what its caches hold
_BLOCK_ELEMENTS_ELSEWHERE = 2**22


class FastTransform:
    """`rows @ D` for one dictionary, size, dtype and device: float32 or float64, (L, n) -> (L, n), any strides."""

    def __init__(self, name: str, n: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.name = name
        self.n = n
        self.twiddle: Tensor | None = None  # (n // 2 + 1,) complex
        self._scipy_dct = _scipy_dct() if device.type == "cpu" and name != "hadamard" else None
        if name == "hadamard":
            self._of_block: Callable[[Tensor, Tensor], None] = self._hadamard
            return
        if name not in FAST_TRANSFORMS:
            raise ValueError(f"dictionary: {name!r} has no fast transform; allowed: {', '.join(FAST_TRANSFORMS)}")
        self._of_block = self._dct2 if name == "dct2" else self._dct3
        angle = torch.arange(n // 2 + 1, dtype=torch.float64, device="cpu") * (math.pi / (2 * n))
        # dct2 multiplies the spectrum by c_k exp(-i angle); dct3 undoes this.
        magnitude = torch.full_like(angle, math.sqrt(2 / n) if name == "dct2" else math.sqrt(n / 2))
        magnitude[0] = math.sqrt(1 / n) if name == "dct2" else math.sqrt(n)
        twiddle = torch.polar(magnitude, -angle if name == "dct2" else angle)
        self.twiddle = twiddle.to(device=device, dtype=torch.complex64 if dtype == torch.float32 else torch.complex128)

    def __call__(self, rows: Tensor) -> Tensor:
        # Fake tensors (planning) are subclasses without data to hand to scipy.
        if self._scipy_dct is not None and rows.shape[0] and type(rows) is Tensor:
            kind, threads = (2 if self.name == "dct2" else 3), torch.get_num_threads()
            return torch.from_numpy(
                self._scipy_dct(rows.detach().numpy(), type=kind, norm="ortho", axis=1, workers=threads)
            )
        result = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        step = max(1, _BLOCK_ELEMENTS.get(rows.device.type, _BLOCK_ELEMENTS_ELSEWHERE) // self.n)
        for start in range(0, rows.shape[0], step):
            self._of_block(rows[start : start + step], result[start : start + step])
        return result

    def _dct2(self, rows: Tensor, result: Tensor) -> None:
        n, half = self.n, self.n // 2
        reordered = torch.cat([rows[:, ::2], rows[:, 1::2].flip(1)], dim=1)
        spectrum = torch.fft.rfft(reordered).mul_(self.twiddle)  # (l, n // 2 + 1)
        # Entry k is the real part of the spectrum at k, entry n - k minus its imaginary part.
        result[:, : half + 1] = spectrum.real
        torch.neg(spectrum.imag[:, 1 : n - half].flip(1), out=result[:, half + 1 :])

    def _dct3(self, rows: Tensor, result: Tensor) -> None:
        n, half = self.n, self.n // 2
        assert self.twiddle is not None
        spectrum = torch.zeros(rows.shape[0], half + 1, dtype=self.twiddle.dtype, device=rows.device)
        spectrum.real.copy_(rows[:, : half + 1])
        torch.neg(rows[:, n - half :].flip(1), out=spectrum.imag[:, 1:])
        reordered = torch.fft.irfft(spectrum.mul_(self.twiddle), n=n)
        result[:, ::2] = reordered[:, : n - half]
        result[:, 1::2] = reordered[:, n - half :].flip(1)

    def _hadamard(self, rows: Tensor, result: Tensor) -> None:
        block, width = hadamard_block(self.n), 1
        result.copy_(rows)
        while width < block:
            pairs = result.view(rows.shape[0], self.n // (2 * width), 2, width)
            first, second = pairs.unbind(2)
            difference = first - second
            first.add_(second)
            second.copy_(difference)
            width *= 2
        result.mul_(math.sqrt(1 / block))


def hadamard_block(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n


@functools.cache
def _scipy_dct() -> Callable[..., Any] | None:
    try:
        from scipy.fft import dct
    except ImportError:
        return None
    return dct  # type: ignore[no-any-return]


_SAMPLE_ROWS = {"cpu": 256}  # enough to fill the device
_SAMPLE_ROWS_ELSEWHERE = 4096

_measured: dict[tuple[str, int, torch.dtype, torch.device], str] = {}


def faster_transform(
    name: str,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    gemm: Callable[[Tensor], Tensor],
    fft: Callable[[Tensor], Tensor],
) -> str:
    """`gemm` or `fft`, whichever took less time here; measured once per process and arguments, then remembered.

    Ranks measure apart and may choose differently. That costs no collective and changes rounding alone, which is safe
    only where no two ranks compute the same scores: then the scores that all see are one sum over ranks, to the bit,
    and all select alike. (True of row shards and of replicas that divide the rows. Where whole replicas repeat the
    work, as under HSDP, a near tie could fall differently in each: the engine does not measure there.)
    """
    key = (name, n, dtype, device)
    if key not in _measured:
        rows = torch.full((_SAMPLE_ROWS.get(device.type, _SAMPLE_ROWS_ELSEWHERE), n), 0.5, dtype=dtype, device=device)
        seconds = {kind: _best_seconds(function, rows) for kind, function in (("gemm", gemm), ("fft", fft))}
        _measured[key] = min(seconds, key=lambda kind: seconds[kind])
    return _measured[key]


def _best_seconds(function: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """Of five calls after a first one."""
    best = math.inf
    for attempt in range(6):
        _wait_for(rows.device)
        start = time.perf_counter()
        function(rows)
        _wait_for(rows.device)
        if attempt:
            best = min(best, time.perf_counter() - start)
    return best


def _wait_for(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
