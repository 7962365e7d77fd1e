"""Times the ways to multiply rows by a dictionary: matrix, torch's FFT, scipy's DCT, columns made on the fly.

    python benchmarks/transform.py [--rows 1024] [--sizes 512 1024] [--dtype float32] [--device cpu] [--threads 1]

Per size, the ways take turns within each repeat, so that a busy moment of the machine hits all of them; the best of
the repeats is shown, and how many times faster than the matrix it is. Errors are against float64, relative to the
largest entry.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from dist_lowrank import fast_transforms
from dist_lowrank.dictionaries import Dictionary


def best_seconds(functions: dict[str, Callable[[], Tensor]], device: torch.device, repeats: int) -> dict[str, float]:
    best = dict.fromkeys(functions, float("inf"))
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            wait(device)
            start = time.perf_counter()
            function()
            wait(device)
            if repeat:  # the first warms up
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def ways(name: str, n: int, dtype: torch.dtype, device: torch.device) -> dict[str, Dictionary]:
    """Dictionaries that transform by the matrix, by torch, and by scipy where that is installed and applies."""
    found = {"gemm": Dictionary(name, n, dtype=dtype, device=device)}
    with mock.patch.object(fast_transforms, "_scipy_dct", return_value=None):
        found["fft"] = Dictionary(name, n, dtype=dtype, device=device, transform="fft", materialize=False)
    if device.type == "cpu" and name != "hadamard" and fast_transforms._scipy_dct() is not None:
        found["scipy"] = Dictionary(name, n, dtype=dtype, device=device, transform="fft", materialize=False)
    return found


def largest_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dictionary", default="dct2", choices=fast_transforms.FAST_TRANSFORMS)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512, 768, 1000, 1024, 2048, 4096])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype, device = getattr(torch, arguments.dtype), torch.device(arguments.device)
    shown = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {arguments.threads} thread(s)"
    print(f"{arguments.dictionary}, {arguments.rows} rows, {arguments.dtype}, {shown}, torch {torch.__version__}")
    print("whole transform: milliseconds (times faster than gemm; error)\n")

    for n in arguments.sizes:
        rows = torch.randn(arguments.rows, n, dtype=dtype, device=device)
        dictionaries = ways(arguments.dictionary, n, dtype, device)
        expected = Dictionary(arguments.dictionary, n, dtype=torch.float64, device=device).transform(rows)
        errors = {way: largest_error(each.transform(rows), expected) for way, each in dictionaries.items()}
        products = {way: partial(each.transform, rows) for way, each in dictionaries.items()}
        seconds = best_seconds(products, device, arguments.repeats)
        cells = [
            f"{way} {1e3 * seconds[way]:9.3f} ({seconds['gemm'] / seconds[way]:5.1f}x; {errors[way]:.0e})"
            for way in dictionaries
        ]
        # A quarter of the columns: gathered from the matrix, or made from the table of 4 n cosines.
        indices = torch.arange(0, n, 4, device=device)
        projections = {way: partial(dictionaries[way].project, rows, indices) for way in ("gemm", "fft")}
        chosen = best_seconds(projections, device, arguments.repeats)
        made = f"n/4 columns: gathered {1e3 * chosen['gemm']:.3f}, on the fly {1e3 * chosen['fft']:.3f}"
        print(f"n {n:5d}  {'  '.join(cells)}  |  {made}")


if __name__ == "__main__":
    main()
