"""Times one optimizer step on the matrices of LLaMA models, ours and others' side by side in one process.

    python benchmarks/optimizer_step.py [--sizes 60m 350m] [--layers 2] [--dtype bfloat16] [--device cuda] [--write]

Every contender takes turns with torch's foreach AdamW, and a step on r columns with its two matrix products alone, on
the same weights and gradients, so that a busy moment of the machine hits all. It is then dropped, so that the largest
model need not hold all states at once. Shown are medians and, because a busy machine only ever adds, the least, of
which the ratios to products are. Where others use the machine, `--clock processor --threads 1` measures what a step
takes of a core: threads of a step that wait for each other count what others take.

The bounds: the two matrix products that a step on r columns cannot do without, `A D_I` and the lift, alone; and the
roofline, the larger of bytes moved over the measured bandwidth of a copy and operations over the measured rate of a
large product of the same dtype.

`--write` puts the table into docs/speed.md; `--short` runs everything once on a tiny model.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measuring import CLOCKS, provenance, show
from torch import Tensor
from torch.nn import Parameter

from dist_lowrank.kernels.products import add_product, product
from dist_lowrank.optim import DCTAdamW, GaLore, Muon, Trion
from dist_lowrank.sharding.layouts import tall_form

SIZES = {  # hidden size, intermediate size, layers
    "tiny": (64, 176, 1),
    "9m": (128, 352, 4),
    "60m": (512, 1376, 8),
    "350m": (1024, 2736, 24),
    "1b": (2048, 5461, 24),
    "7b": (4096, 11008, 32),
}
RANKS = {"n/16": 1 / 16, "n/4": 1 / 4}
# Name, package and its class, options, products of an ordinary step on r columns; `make step-benchmark` installs them.
PEERS = (
    ("pytorch-optimizer GaLore", "pytorch_optimizer", "GaLore", {"projection_type": "std"}, 2),
    ("galore-torch GaLore", "galore_torch", "GaLoreAdamW", {"proj_type": "std"}, 2),
    ("pytorch-optimizer APOLLO", "pytorch_optimizer", "APOLLO", {"projection_type": "std"}, 1),
    (
        *("apollo-torch APOLLO", "apollo_torch", "APOLLOAdamW"),
        *({"proj_type": "std", "proj": "random", "scale_type": "channel"}, 1),
    ),
    ("pytorch-optimizer Fira", "pytorch_optimizer", "Fira", {"projection_type": "std"}, 2),
)
NEVER = 10**9  # steps between refreshes, after the first
LR = 1e-6
DECAY = 0.01  # torch's default, which its contenders keep
Step = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One line of the table."""

    name: str
    make: Callable[[list[Parameter]], Step]  # imports what it needs
    products: str | None = None  # of RANKS: the two products that are its bound
    bytes_moved: int | None = None
    operations: int | None = None  # of matrix products


def matrices(size: str, layers: int | None) -> list[tuple[int, int]]:
    hidden, intermediate, all_layers = SIZES[size]
    layer = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    return layer * (layers or all_layers)


def tall(tensor: Tensor) -> Tensor:
    return tall_form(tuple(tensor.shape), "shorter", 1).view(tensor)


# Contenders -----------------------------------------------------------------------------------------------------------


def ours(optimizer: type[Any], **options: Any) -> Callable[[list[Parameter]], Step]:
    def make(parameters: list[Parameter]) -> Step:
        if options.get("kernels") == "triton":
            import triton  # noqa: F401 (so that it is told here where it is not installed)
        made = optimizer(parameters, lr=LR, weight_decay=DECAY, verify_every=0, **options)
        return made.step  # type: ignore[no-any-return]

    return make


def torchs(name: str, **options: Any) -> Callable[[list[Parameter]], Step]:
    return lambda parameters: getattr(torch.optim, name)(parameters, lr=LR, **options).step


def torchaos(parameters: list[Parameter]) -> Step:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=LR).step


def projected(
    module: str, name: str, fraction: float, interval: int, **options: Any
) -> Callable[[list[Parameter]], Step]:
    """Of a package; one rank for all matrices, which compress the same axis length."""

    def make(parameters: list[Parameter]) -> Step:
        optimizer = getattr(importlib.import_module(module), name)
        rank = round(fraction * min(parameters[0].shape))
        group = {"params": parameters, "rank": rank, "update_proj_gap": interval, "scale": 1.0}
        return optimizer([group | options], lr=LR, weight_decay=DECAY).step  # type: ignore[no-any-return]

    return make


def products(fraction: float, torchs_own: bool = False) -> Callable[[list[Parameter]], Step]:
    """The two matrix products of an ordinary step, and nothing else, as our steps compute them or by torch's own."""

    def make(parameters: list[Parameter]) -> Step:
        pairs = [(tall(parameter.detach()), tall(parameter.grad)) for parameter in parameters]
        atoms = {
            weight.shape[1]: torch.randn(round(fraction * weight.shape[1]), weight.shape[1]).to(weight)
            for weight, _ in pairs
        }

        def step() -> None:
            for weight, gradient in pairs:
                chosen = atoms[weight.shape[1]]
                if torchs_own:
                    weight.addmm_(gradient @ chosen.t(), chosen, beta=1 - LR * DECAY, alpha=-LR)
                else:
                    add_product(weight, product(gradient, chosen.t()), chosen, beta=1 - LR * DECAY, alpha=-LR)

        return step

    return make


def contenders(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> Iterator[Contender]:
    """Bytes count the gradient, the weight twice, and moments, float32, twice; operations a product's two per entry."""
    elements = sum(rows * columns for rows, columns in shapes)
    n = min(shapes[0])
    weights_bytes = 3 * elements * dtype.itemsize
    adamw_bytes = weights_bytes + 4 * elements * dtype.itemsize
    yield Contender("torch AdamW, foreach", torchs("AdamW", foreach=True), bytes_moved=adamw_bytes)
    yield Contender("torch AdamW, fused", torchs("AdamW", fused=True), bytes_moved=adamw_bytes)
    yield Contender("torchao AdamW8bit", torchaos, bytes_moved=weights_bytes + 4 * elements)
    yield Contender("torch Muon", torchs("Muon"))
    for label, fraction in RANKS.items():
        rank = round(fraction * n)
        moved = weights_bytes + round(16 * elements * fraction)
        yield Contender(f"the two products, {label}", products(fraction), label, None, 4 * elements * rank)
        own = products(fraction, torchs_own=True)
        yield Contender(f"the same by torch's mm and addmm_, {label}", own, label, None, 4 * elements * rank)
        name, make = f"DCTAdamW {label}", DCTAdamW
        ordinary = ours(make, rank=fraction, refresh_interval=NEVER)
        yield Contender(name, ordinary, label, moved, 4 * elements * rank)
        by_matrix = 2 * elements * (n + rank)
        yield Contender(f"{name}, refresh", ours(make, rank=fraction), None, moved, by_matrix)
        if dtype == torch.bfloat16:  # what is rounded to it anyway
            narrow: dict[str, Any] = {"rank": fraction, "transform_precision": "bf16", "moment_dtype": dtype}
            kinds = {"bf16 operands and moments": narrow}
            if device.type == "cuda":
                kinds["the same in triton"] = narrow | {"kernels": "triton"}
            for kind, options in kinds.items():
                fewer = moved - round(8 * elements * fraction)
                ordinary = ours(make, refresh_interval=NEVER, **options)
                yield Contender(f"{name}, {kind}", ordinary, label, fewer, 4 * elements * rank)
                yield Contender(f"{name}, {kind}, refresh", ours(make, **options), None, fewer, by_matrix)
        by_fft = round(elements * (2 * rank + 2.5 * math.log2(n)))
        yield Contender(f"{name}, refresh by fft", ours(make, rank=fraction, transform="fft"), None, moved, by_fft)
        one = 2 * elements * rank
        ordinary = ours(GaLore, rank=fraction, refresh_interval=NEVER)
        yield Contender(f"GaLore {label}", ordinary, label, moved, 2 * one)
        by_svd = 2 * elements * n + 2 * one  # and the decomposition, which is no product
        refresh = ours(GaLore, rank=fraction, refresh_interval=1)
        yield Contender(f"GaLore {label}, refresh", refresh, None, moved, by_svd)
        for name, module, kind, options, count in PEERS:
            theirs = projected(module, kind, fraction, NEVER, **options)
            yield Contender(f"{name} {label}", theirs, label, moved, count * one)
            if kind.startswith("GaLore"):
                theirs = projected(module, kind, fraction, 1, **options)
                yield Contender(f"{name} {label}, refresh", theirs, None, moved, count * one)
    rank, moved = round(n / 4), weights_bytes + 8 * elements  # the whole momentum
    trion = 2 * elements * (n + rank) + elements * rank
    yield Contender("Trion n/4", ours(Trion, rank=1 / 4), None, moved, trion)
    if dtype == torch.bfloat16:
        narrow = {"rank": 1 / 4, "transform_precision": "bf16"}
        yield Contender("Trion n/4, bf16 operands", ours(Trion, **narrow), None, moved, trion)
    yield Contender("Muon", ours(Muon))


# Measuring ------------------------------------------------------------------------------------------------------------


def milliseconds(step: Step, device: torch.device, clock: Callable[[], float]) -> float:
    """Of one call; on a GPU by events on its stream, which the host only waits for."""
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)
    begin = clock()
    step()
    return 1e3 * (clock() - begin)


def in_turns(steps: Sequence[Step], options: argparse.Namespace) -> list[list[float]]:
    """Milliseconds of each after one call that warms up; fewer repeats, but two at least, where they take too long."""
    device, clock = torch.device(options.device), CLOCKS[options.clock]
    times: list[list[float]] = [[] for _ in steps]
    begin = time.monotonic()
    for repeat in range(options.repeats + 1):
        if repeat > 2 and time.monotonic() - begin > options.seconds:
            break
        for step, of_step in zip(steps, times, strict=True):
            taken = milliseconds(step, device, clock)
            if repeat:
                of_step.append(taken)
    return times


def machine_rates(dtype: torch.dtype, side: int, options: argparse.Namespace) -> tuple[float, float]:
    """Bytes per second of a copy, read and write counted, and operations per second of a square product."""
    a = torch.ones(side, side, dtype=dtype, device=options.device)
    source = a.repeat(16, 1)
    target = torch.empty_like(source)
    copied, multiplied = in_turns([lambda: target.copy_(source), lambda: product(a, a)], options)
    return 2e3 * source.nbytes / min(copied), 2e3 * side**3 / min(multiplied)


def table(size: str, layers: int | None, options: argparse.Namespace) -> list[str]:
    """The lines of one model in Markdown."""
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    torch.manual_seed(0)
    shapes = matrices(size, layers)
    parameters = [Parameter(0.02 * torch.randn(shape).to(device, dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = 0.01 * torch.randn_like(parameter)
    bandwidth, rate = machine_rates(dtype, 64 if options.short else 1024 if device.type == "cpu" else 8192, options)
    adamw = torchs("AdamW", foreach=True)(parameters)
    bounds = {
        label: [products(fraction, torchs_own)(parameters) for torchs_own in (False, True)]
        for label, fraction in RANKS.items()
    }
    count = sum(parameter.numel() for parameter in parameters)
    lines = [
        f"{size}, {layers or SIZES[size][2]} layers, {count / 1e6:.1f} M parameters in {len(shapes)} matrices, "
        f"{options.dtype}; {options.clock} time, {torch.get_num_threads()} threads; {bandwidth / 1e9:.0f} GB/s, "
        f"{rate / 1e9:.0f} GFLOP/s.",
        "",
        "| step | median, ms | least, ms | x foreach AdamW | x two products | x by torch's own | roofline, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for contender in contenders(shapes, dtype, device):
        if options.only not in contender.name:
            continue
        try:
            step = contender.make(parameters)
        except ImportError as error:
            lines.append(f"| {contender.name} | not installed: {error.name} | | | | | |")
            continue
        with torch.no_grad():
            reference, *of_products, times = in_turns([adamw, *bounds.get(str(contender.products), []), step], options)
        ratios = [f"{min(times) / min(each):.2f}" for each in of_products] or ["", ""]
        lower = max((contender.bytes_moved or 0) / bandwidth, (contender.operations or 0) / rate)
        lines.append(
            f"| {contender.name} | {statistics.median(times):.2f} | {min(times):.2f} | "
            f"{statistics.median(times) / statistics.median(reference):.2f} | "
            f"{' | '.join(ratios)} | {f'{1e3 * lower:.2f}' if lower else ''} |"
        )
        print(lines[-1], flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["60m", "350m"])
    parser.add_argument("--only", default="", help="lines whose name contains this")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and gradients")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="elapsed", help="on a CPU")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60, help="for one contender, at most about")
    parser.add_argument("--short", action="store_true", help="everything once, on a tiny model")
    parser.add_argument("--write", action="store_true", help="also into docs/speed.md")
    options = parser.parse_args(arguments)
    if options.short:
        options.sizes, options.repeats, options.threads = ["tiny"], 1, 1
    threads, device = torch.get_num_threads(), torch.device(options.device)
    torch.set_num_threads(options.threads)
    try:
        tables = ["\n".join(table(size, options.layers, options)) for size in options.sizes]
    finally:
        torch.set_num_threads(threads)
    text = "\n\n".join([provenance(__file__, arguments, device), *tables])
    return show(f"optimizer step, {device.type}, {options.dtype}", text, write=options.write)


if __name__ == "__main__":
    main()
