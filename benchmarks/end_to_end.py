"""Tokens per second of whole training steps, and what part of them the optimizer takes.

    python benchmarks/end_to_end.py [--model llama_tiny] [--processes 2] [--write] [OVERRIDE ...]
    python benchmarks/end_to_end.py --device cuda --model llama_350m --precision bf16 --write train.micro_batch_size=16

A step is what `dist-lowrank train` makes of the same overrides: forward and backward passes over the micro-batches of
the global batch, clipping, update; on random tokens, without data, evaluation and logs. All optimizers take turns, each
with a model of its own. Shown is the slowest rank. On a CPU the default model is trained by two processes of a thread
each, as by default; on a GPU there is one process.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from measuring import CLOCKS, ROOT, provenance, show

from dist_lowrank.config import RunConfig, compose
from dist_lowrank.training.evaluate import next_token_loss
from dist_lowrank.training.model import build_model, model_configuration
from dist_lowrank.training.strategy import Strategy, make_strategy

sys.path.insert(0, str(ROOT / "tests"))
from processes import run_on_ranks

# By line of the table: overrides. What is chosen every 200 steps is chosen in the first alone, which is not timed.
CONTENDERS = {
    "AdamW, fused": ("optimizer=adamw",),
    "AdamW, 8 bits": ("optimizer=adamw8bit",),
    "DCT-AdamW": ("optimizer=dct_adamw",),
    "DCT-AdamW, refresh by fft": ("optimizer=dct_adamw", "optimizer.transform=fft"),
    "DCT-AdamW, between refreshes": ("optimizer=dct_adamw", "optimizer.refresh_interval=200"),
    "GaLore, between refreshes": ("optimizer=galore",),
    "GaLore, refresh": ("optimizer=galore", "optimizer.refresh_interval=1"),
    "Fira, between refreshes": ("optimizer=fira",),
    "APOLLO": ("optimizer=apollo",),
    "Trion": ("optimizer=trion",),
    "Dion": ("optimizer=dion",),
    "Muon": ("optimizer=muon",),
}
SHORT = ("AdamW, fused", "DCT-AdamW")
SMALL = (
    *("model.config.hidden_size=64", "model.config.intermediate_size=176", "model.config.num_hidden_layers=2"),
    *("model.config.vocab_size=320", "data.vocab_size=320", "data.sequence_length=32"),
)


@dataclass(frozen=True)
class Step:
    """Seconds."""

    whole: float
    optimizer: float


def measure(rank: int, configs: Sequence[RunConfig], options: argparse.Namespace) -> list[list[Step]]:
    """On one rank: the steps of each configuration."""
    device = torch.device(options.device)
    if device.type == "cuda":
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(rank)
    trained = [make_strategy(config, build_model(config).to(device), device) for config in configs]
    config = configs[0]
    size = (config.train.global_batch_size // dist.get_world_size(), config.data.sequence_length)
    batch = torch.randint(1, model_configuration(config).vocab_size, size, device=device)
    steps: list[list[Step]] = [[] for _ in configs]
    gc.collect()
    gc.disable()
    for number in range(options.steps + 1):
        for strategy, own in zip(trained, steps, strict=True):
            dist.barrier()
            step = _step(strategy, batch.split(config.train.micro_batch_size), _clock(device, options.clock))
            if number:  # the first makes state
                own.append(step)
    return steps


def _clock(device: torch.device, name: str) -> Callable[[], float]:
    if device.type == "cpu":
        return CLOCKS[name]

    def when_done() -> float:
        torch.cuda.synchronize(device)
        return CLOCKS["elapsed"]()

    return when_done


def _step(strategy: Strategy, micro_batches: Sequence[torch.Tensor], clock: Callable[[], float]) -> Step:
    begin = clock()
    for index, micro_batch in enumerate(micro_batches, start=1):
        with strategy.forward():
            loss = next_token_loss(strategy.model, micro_batch) / len(micro_batches)
        strategy.backward(loss, last=index == len(micro_batches))
    strategy.prepare()
    before = clock()
    strategy.step(skip=False)
    end = clock()
    return Step(end - begin, end - before)


def table(steps: dict[str, list[Step]], tokens: int) -> list[str]:
    """In Markdown, from the steps of the slowest rank and the tokens of one over all ranks."""
    lines = [
        "| optimizer | tokens/s | step, ms | least | optimizer, ms | least | of the step, % | x AdamW's step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reference = statistics.median(step.whole for step in next(iter(steps.values())))
    for name, own in steps.items():
        whole, optimizer = [step.whole for step in own], [step.optimizer for step in own]
        median = statistics.median(whole)
        share = statistics.median(step.optimizer / step.whole for step in own)
        lines.append(
            f"| {name} | {tokens / median:,.0f} | {1e3 * median:.1f} | {1e3 * min(whole):.1f} | "
            f"{1e3 * statistics.median(optimizer):.2f} | {1e3 * min(optimizer):.2f} | {100 * share:.1f} | "
            f"{median / reference:.3f} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_tiny")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=2, help="on a CPU, of one thread each")
    parser.add_argument("--clock", choices=CLOCKS, default="elapsed", help="on a CPU")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--short", action="store_true", help="two optimizers, on a tiny model")
    parser.add_argument("--write", action="store_true", help="also into docs/speed.md")
    parser.add_argument("overrides", nargs="*", help="of the run, such as train.micro_batch_size=16")
    options = parser.parse_args(arguments)
    names = SHORT if options.short else tuple(CONTENDERS)
    if options.short:
        options.steps = 3
    device = torch.device(options.device)
    run = [f"model={options.model}", f"precision={options.precision}", f"launcher.device={device.type}"]
    run += [*(SMALL if options.short else ()), *options.overrides]
    configs = [compose([*run, *CONTENDERS[name]]) for name in names]
    processes = options.processes if device.type == "cpu" else 1
    if device.type == "cpu":
        ranks = run_on_ranks(processes, measure, configs, options, timeout_seconds=570)
    else:
        ranks = [measure(0, configs, options)]
    slowest = [
        [max(of_ranks, key=lambda step: step.whole) for of_ranks in zip(*own, strict=True)]
        for own in zip(*ranks, strict=True)
    ]
    train, sequence = configs[0].train, configs[0].data.sequence_length
    tokens = train.global_batch_size // processes * processes * sequence
    parameters = sum(parameter.numel() for parameter in build_model(configs[0], meta=True).parameters())
    header = (
        f"{options.model}, {parameters / 1e6:.1f} M parameters, {options.precision}, {configs[0].strategy.name}, "
        f"{processes} processes; {tokens} tokens in a step, micro-batches of {train.micro_batch_size} x {sequence}; "
        f"{options.clock} time. {provenance(__file__, arguments, device)}"
    )
    lines = [header, "", *table(dict(zip(names, slowest, strict=True)), tokens)]
    return show(f"end to end, {device.type}, {options.model}", "\n".join(lines), write=options.write)


if __name__ == "__main__":
    main()
