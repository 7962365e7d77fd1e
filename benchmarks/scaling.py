"""How an optimizer step grows with the model, and with the number of processes.

    python benchmarks/scaling.py [--models llama_9m ... llama_350m] [--clock processor] [--threads 1] [--write]

**With the model**: steps on all parameters of whole models, random gradients, one process. The exponent is the slope
of the least times over the parameters, both in logarithms: 1 is linear. Steps at a fixed number of columns do the same
for each parameter. At a fraction of n they multiply more for each the wider the model is; what exponent that amounts
to, where products take all of the time, stands below.

**With the processes**, at a fixed shard: every rank holds as many parameters however many ranks there are, since the
model is wider (more heads, a longer intermediate axis: a rank's pieces of its matrices stay what they are) or deeper
(more layers: it has thinner pieces of more matrices), with a larger vocabulary. Two processes on their own, that know
nothing of each other, tell what sharing the machine costs. With four processes there are more than cores, so that only
processor time and bytes count.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from measuring import CLOCKS, ROOT, provenance, show
from torch import nn

from dist_lowrank.config import RunConfig, compose
from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.traffic import collectives_of_step
from dist_lowrank.sharding.layouts import local
from dist_lowrank.strategies import apply_strategy
from dist_lowrank.training.model import blocks, build_model, low_rank_forms, route
from dist_lowrank.training.optimizers import make_optimizer

sys.path.insert(0, str(ROOT / "tests"))
from collectives import CountCollectives
from processes import run_on_ranks

MODELS = [f"llama_{size}" for size in ("9m", "20m", "60m", "130m", "350m")]
NEVER = f"optimizer.refresh_interval={10**9}"
# By column of the first table: overrides.
STEPS = {
    "AdamW, fused": ("optimizer=adamw",),
    "r = 32": ("optimizer.rank=32", NEVER),
    "r = 32, refresh by fft": ("optimizer.rank=32", "optimizer.transform=fft"),
    "n/4": (NEVER,),
    "n/4, refresh": (),
}
KINDS = {"ordinary": (NEVER,), "refresh": ()}  # of the second table; n/4
GROUPS = ((1, False), (2, True), (2, False), (4, False))  # processes, and whether each is on its own
SHORT_GROUPS = GROUPS[::2]
# A shard: two layers as of llama_60m, and a part of the vocabulary. What each process adds to the model:
SHARD = ("model=llama_60m", "data.vocab_size=320", "model.config.head_dim=64", "model.config.num_hidden_layers=2")
WORDS = {"vocab_size": 2048}
GROWTHS = {
    "wider": {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1376, **WORDS},
    "deeper": {"num_hidden_layers": 2, **WORDS},
}


@dataclass(frozen=True)
class Times:
    """Milliseconds."""

    all: list[float]

    def __str__(self) -> str:
        return f"{statistics.median(self.all):.1f} ({min(self.all):.1f} to {max(self.all):.1f})"


def fill_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
        local(parameter.grad).normal_(std=0.01)


def timed(step: Callable[[], object], repeats: int, clock: Callable[[], float]) -> Times:
    """After one call that warms up."""
    times = []
    for _ in range(repeats + 1):
        begin = clock()
        step()
        times.append(1e3 * (clock() - begin))
    return Times(times[1:])


# With the model -------------------------------------------------------------------------------------------------------


def times_of_models(options: argparse.Namespace) -> list[str]:
    """The lines of the first table in Markdown."""
    counts, operations, by_step = [], [], {name: [] for name in STEPS}
    lines = [
        f"Milliseconds, median (least to most) of {options.repeats}; {options.clock} time, {options.threads} threads.",
        "",
        f"| model | parameters | {' | '.join(STEPS)} |",
        "|---" * (2 + len(STEPS)) + "|",
    ]
    torch.set_num_threads(options.threads)
    small = [f"{key}=320" for key in ("model.config.vocab_size", "data.vocab_size")] if options.short else []
    for name in options.models:
        base = [f"model={name}", *small]
        model = build_model(compose(base))
        fill_gradients(model)
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
        forms = low_rank_forms(route(model, compose(base)), compose(base)).values()
        operations.append(sum(form.rows * form.n * form.rank for form in forms))
        for label, overrides in STEPS.items():
            config = compose([*base, *overrides])
            optimizer = make_optimizer(config, route(model, config))
            by_step[label].append(timed(optimizer.step, options.repeats, CLOCKS[options.clock]))
        lines.append(f"| {name} | {counts[-1]:,} | {' | '.join(str(each[-1]) for each in by_step.values())} |")
        print(lines[-1], flush=True)
    fitted = [_exponent(counts, [min(each.all) for each in times]) for times in by_step.values()]
    return [
        *lines,
        f"| exponent | | {' | '.join(f'{each:.2f}' for each in fitted)} |",
        "",
        f"The products at n/4 alone have the exponent {_exponent(counts, operations):.2f}.",
    ]


def _exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the straight line through logarithms."""
    pair = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(*pair).slope


# With the processes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnRank:
    """Of one rank: a step as its clock and its processor have it, and what it sends."""

    elapsed: Times
    processor: Times
    bytes: int
    parameters: int  # of its shard


def config_of(growth: str, processes: int, overrides: Sequence[str], short: bool) -> RunConfig:
    size = [f"model.config.{key}={each * processes}" for key, each in GROWTHS[growth].items()]
    small = ["model.config.hidden_size=64"] if short else []
    return compose([*SHARD, *size, *small, "strategy=fsdp", *overrides])


def measure(rank: int, config: RunConfig, repeats: int) -> OnRank:
    """On one rank of those that share the model."""
    if not dist.is_initialized():  # on its own
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = build_model(config)
    forms = low_rank_forms(route(model, config), config)
    apply_strategy(model, blocks(model), config.strategy, config.precision, forms, torch.device("cpu"))
    optimizer = make_optimizer(config, route(model, config))
    assert isinstance(optimizer, LowRankOptimizer)
    fill_gradients(model)
    optimizer.step()  # binds, and chooses columns
    ordinary = bool(optimizer.param_groups[0]["refresh_interval"] > 1)
    with CountCollectives() as counter:
        optimizer.step()
    declared = sum(each.bytes for each in collectives_of_step(optimizer, refresh=not ordinary))
    if sum(counter.sent_bytes) != declared:
        raise AssertionError(f"{sum(counter.sent_bytes)} bytes counted, {declared} declared")
    gc.collect()
    gc.disable()  # of what the benchmark's parent has imported
    elapsed, processor = [], []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter(), time.process_time()
        optimizer.step()
        elapsed.append(1e3 * (time.perf_counter() - begin[0]))
        processor.append(1e3 * (time.process_time() - begin[1]))
    parameters = sum(parameter.to_local().numel() for parameter in model.parameters())
    return OnRank(Times(elapsed), Times(processor), declared, parameters)


def times_of_processes(options: argparse.Namespace) -> list[str]:
    """The lines of the second table in Markdown."""
    lines = [
        f"DCT-AdamW at n/4 under FSDP2, a thread for each process; milliseconds, median (least to most) of "
        f"{options.repeats}. Elapsed is that of the slowest rank, processor time that of all ranks.",
        "",
        "| step | model | processes | parameters per rank | elapsed | processor, per rank | bytes per rank |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds, groups = (list(KINDS)[-1:], SHORT_GROUPS) if options.short else (list(KINDS), GROUPS)
    for kind, growth, (processes, alone) in itertools.product(kinds, GROWTHS, groups):
        config = config_of(growth, 1 if alone else processes, KINDS[kind], options.short)
        arguments = (config, options.repeats)
        ranks = run_on_ranks(processes, measure, *arguments, timeout_seconds=200, distributed=not alone)
        slowest = Times([max(step) for step in zip(*(each.elapsed.all for each in ranks), strict=True)])
        processor = Times([time for each in ranks for time in each.processor.all])
        shown = "2, each on its own" if alone else str(processes)
        elapsed = str(slowest) if processes <= 2 else ""
        sent = f"{max(each.bytes for each in ranks):,}"
        parameters = f"{max(each.parameters for each in ranks):,}"
        lines.append(f"| {kind} | {growth} | {shown} | {parameters} | {elapsed} | {processor} | {sent} |")
        print(lines[-1], flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--threads", type=int, default=2, help="of the one process whose model grows")
    parser.add_argument("--clock", choices=CLOCKS, default="elapsed", help="for the same")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="everything twice, on tiny models")
    parser.add_argument("--write", action="store_true", help="also into docs/speed.md")
    options = parser.parse_args(arguments)
    if options.short:
        options.models, options.repeats, options.threads = ["llama_9m", "llama_20m"], 2, 1
    header = provenance(__file__, arguments, torch.device("cpu"))
    processes = times_of_processes(options)  # first: threads do not survive a fork
    threads = torch.get_num_threads()
    try:
        models = times_of_models(options)
    finally:
        torch.set_num_threads(threads)
    return show("scaling", "\n".join([header, "", *models, "", *processes]), write=options.write)


if __name__ == "__main__":
    main()
