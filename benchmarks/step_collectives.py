"""What steps send on gloo, call by call: counted, timed, and compared with what was declared beforehand.

    python benchmarks/step_collectives.py [--model llama_tiny] [--steps 9] [--write]

Real processes train a model on random tokens; every collective of a backward pass and of an optimizer's step is caught
as it is called. Bytes are those of the tensors that rank 0 hands over. They have to be those that
`dist_lowrank.planning.traffic` (gradients and weights) and `dist_lowrank.optim.traffic` (the optimizer) declare for the
layout: if one is not, this ends with an error. A call is timed alone, from a barrier on and until it is done, so that
neither a slower rank nor anything that runs meanwhile counts.

Where `strategy.low_rank_gradients` is exact, the same steps are made again with whole gradients, and the weights of
both compared, in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from measuring import ROOT, provenance, show

from dist_lowrank.config import RunConfig, compose
from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.traffic import collectives_of_step
from dist_lowrank.planning.traffic import strategy_traffic
from dist_lowrank.training.evaluate import next_token_loss
from dist_lowrank.training.model import build_model
from dist_lowrank.training.planned_parameters import PlannedParameter, planned_parameters
from dist_lowrank.training.strategy import Strategy, make_strategy
from dist_lowrank.training.traffic_forecast import TrafficRow

sys.path.insert(0, str(ROOT / "tests"))
from collectives import CountCollectives
from processes import run_on_ranks

EVERY = "every step"  # as `TrafficRow` has it
INTERVAL = 4  # steps between refreshes
KEPT = f"optimizer.refresh_interval={INTERVAL}"
COEFFICIENTS = ("strategy=ddp", "strategy.low_rank_gradients=true")
# Processes and overrides.
CASES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (2, ("strategy=ddp", "optimizer=adamw")),
    (2, ("strategy=ddp", "optimizer=dct_adamw", KEPT)),
    (2, (*COEFFICIENTS, "optimizer=dct_adamw", KEPT)),
    (4, (*COEFFICIENTS, "optimizer=dct_adamw", KEPT)),
    (2, (*COEFFICIENTS, "optimizer=galore", KEPT)),
    (2, (*COEFFICIENTS, "optimizer=dct_adamw", "optimizer.selection=previous")),
    (2, ("strategy=fsdp", "optimizer=dct_adamw", KEPT)),
    (4, ("strategy=fsdp", "optimizer=dct_adamw", KEPT)),
    (4, ("strategy=hsdp", "strategy.shard_size=2", "optimizer=dct_adamw", KEPT)),
    (2, ("strategy=fsdp", "optimizer=galore", KEPT)),
    (2, ("strategy=fsdp", "optimizer=trion")),
    (2, ("strategy=fsdp", "optimizer=dion")),
    (2, ("strategy=fsdp", "optimizer=muon")),
)
SHORT = tuple(CASES[i] for i in (3, 5, 12))
SMALL = (
    *("model.config.vocab_size=320", "model.config.hidden_size=16", "model.config.intermediate_size=48"),
    *("model.config.num_attention_heads=4", "model.config.num_hidden_layers=2"),
    *("data.vocab_size=320", "data.sequence_length=16"),
)
# On gloo; what is declared is in words of torch.distributed.
OPERATIONS = {
    "broadcast_": "broadcast",
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
}


@dataclass(frozen=True)
class Line:
    """The collectives of one kind of step for one purpose."""

    step: str
    purpose: str
    operation: str
    calls: int
    bytes: int  # that rank 0 hands over, declared and counted
    seconds: list[float]  # of all calls, by step


class TimedCollectives(CountCollectives):
    """Counts, and waits for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            return super().__torch_dispatch__(func, types, args, kwargs)
        dist.barrier()
        begin = time.perf_counter()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        work = result[-1] if isinstance(result, tuple) else result
        work.wait()
        self.seconds.append(time.perf_counter() - begin)
        return result


@dataclass(frozen=True)
class Sent:
    """The calls of one phase of one step."""

    operations: list[str]
    sizes_bytes: list[int]
    seconds: list[float]

    def of(self, operation: str) -> tuple[int, int, float]:
        """Calls, bytes and seconds."""
        found = [i for i, each in enumerate(self.operations) if each == operation]
        return len(found), sum(self.sizes_bytes[i] for i in found), sum(self.seconds[i] for i in found)


def caught(action: Callable[[], object]) -> Sent:
    with TimedCollectives() as timed:
        action()
    return Sent([OPERATIONS[name] for name, _ in timed.calls], timed.sent_bytes, timed.seconds)


# One case, on one rank ------------------------------------------------------------------------------------------------


def measure(
    rank: int, config: RunConfig, declared: Sequence[TrafficRow], steps: int, compare: bool
) -> tuple[list[Line], float | None]:
    """What a step of each kind sends, and by how much weights differ from those of whole gradients."""
    strategy = make_strategy(config, build_model(config), torch.device("cpu"))
    batches = _batches(config, steps, rank)
    # The first step also compares replicas, and sums whole gradients.
    found = [(_kind(strategy, step), *_step(strategy, batch)) for step, batch in enumerate(batches, start=1)][1:]
    lines = [_of_strategy(row, [sent for kind, sent, _ in found if row.step in (EVERY, kind)]) for row in declared]
    for kind in dict.fromkeys(kind for kind, _, _ in found):
        lines += _of_optimizer(kind, [sent for each, _, sent in found if each == kind], strategy.optimizer, config)
        operations = {name for each, sent, _ in found if each == kind for name in sent.operations}
        expected = {row.operation for row in declared if row.step in (EVERY, kind)}
        _check(f"operations of {kind}", operations - {"broadcast"}, expected)  # of buffers, which are not declared
    return lines, _difference(config, batches) if compare else None


def _kind(strategy: Strategy, step: int) -> str:
    """In the words of `TrafficRow`."""
    optimizer = strategy.optimizer
    if not isinstance(optimizer, LowRankOptimizer) or optimizer.param_groups[0].get("refresh_interval", 1) == 1:
        return EVERY
    return "refresh" if optimizer.recipe(optimizer.param_groups[0]).refreshes(step) else "between refreshes"


def _batches(config: RunConfig, steps: int, rank: int) -> torch.Tensor:
    """Random tokens; enough of them that gradients have full rank, as a run's."""
    generator = torch.Generator().manual_seed(rank)
    size = (steps, config.train.global_batch_size // dist.get_world_size(), config.data.sequence_length)
    return torch.randint(1, config.data.vocab_size, size, generator=generator)


def _step(strategy: Strategy, batch: torch.Tensor) -> tuple[Sent, Sent]:
    """What the backward pass sends, with the forward pass, and what the optimizer does."""
    gradients = caught(lambda: strategy.backward(next_token_loss(strategy.model, batch), last=True))
    strategy.prepare()
    return gradients, caught(lambda: strategy.step(skip=False))


def _of_strategy(row: TrafficRow, sent: Sequence[Sent]) -> Line:
    by_step = [each.of(row.operation) for each in sent]
    _check(f"{row.purpose} of {row.step}", [size for _, size, _ in by_step], [row.bytes] * len(sent))
    seconds = [seconds for _, _, seconds in by_step]
    return Line(row.step, row.purpose, row.operation, by_step[0][0], row.bytes, seconds)


def _of_optimizer(
    kind: str, sent: Sequence[Sent], optimizer: torch.optim.Optimizer, config: RunConfig
) -> Iterator[Line]:
    declared = []
    if isinstance(optimizer, LowRankOptimizer):
        summed = config.strategy.low_rank_gradients
        declared = collectives_of_step(optimizer, refresh=kind != "between refreshes", scores_known=summed)
    for each in sent:
        counted = list(zip(each.operations, each.sizes_bytes, strict=True))
        _check(f"the optimizer's calls of {kind}", counted, [(one.operation, one.bytes) for one in declared])
    for purpose in dict.fromkeys(one.purpose for one in declared):
        own = [i for i, one in enumerate(declared) if one.purpose == purpose]
        size_bytes = sum(declared[i].bytes for i in own)
        seconds = [sum(each.seconds[i] for i in own) for each in sent]
        yield Line(kind, f"optimizer: {purpose}", declared[own[0]].operation, len(own), size_bytes, seconds)


def _check(what: str, counted: Any, declared: Any) -> None:
    if counted != declared:
        raise AssertionError(f"{what}: {counted} counted, {declared} declared")


def _difference(config: RunConfig, batches: torch.Tensor) -> float:
    """The largest one between weights after these steps and after the same with whole gradients, in float64."""
    trained = []
    for low_rank in (True, False):
        strategy = dataclasses.replace(config.strategy, low_rank_gradients=low_rank)
        precision = dataclasses.replace(config.precision, name="fp64")
        double = dataclasses.replace(config, strategy=strategy, precision=precision)
        trained.append(make_strategy(double, build_model(double), torch.device("cpu")))
        for batch in batches:
            _step(trained[-1], batch)
    pairs = zip(*(list(each.model.parameters()) for each in trained), strict=True)
    return max(float((ours.detach() - theirs.detach()).abs().max()) for ours, theirs in pairs)


# The table ------------------------------------------------------------------------------------------------------------


def table(processes: int, overrides: Sequence[str], options: argparse.Namespace) -> list[str]:
    """The lines of one case in Markdown."""
    model = [f"model={options.model}", *(SMALL if options.short else ()), "train.global_batch_size=8"]
    config = compose([*model, *overrides, "launcher.device=cpu", "train.clip_norm=null"])
    parameters = planned_parameters(config)
    exact = config.strategy.low_rank_gradients and "optimizer.selection=previous" not in overrides
    declared = strategy_traffic(config, parameters, processes)
    arguments = (config, declared, options.steps, exact)
    lines, difference = run_on_ranks(processes, measure, *arguments, timeout_seconds=300)[0]
    changed = [str(processes), f"`{' '.join(each.split('.')[-1] for each in overrides)}`"]
    differs = "" if difference is None else f"{difference:.0e}"
    rows = []
    for line in lines:
        part = _part(line, parameters) if config.strategy.low_rank_gradients else ""
        rows.append(f"| {' | '.join([*changed, *_cells(line), part, differs])} |")
        changed, differs = ["", ""], ""  # once for a case
    return rows


def _cells(line: Line) -> list[str]:
    times = [1e3 * seconds for seconds in line.seconds]
    counts = [str(line.calls), f"{line.bytes:,}", f"{statistics.median(times):.2f}", f"{min(times):.2f}"]
    return [line.step, line.purpose, line.operation, *counts]


def _part(line: Line, parameters: Sequence[PlannedParameter]) -> str:
    """Of the gradients of matrices on the low-rank path, what is sent."""
    if line.purpose != "gradients":
        return ""
    matrices = sum(each.tensor.nbytes for each in parameters if each.form is not None)
    others = sum(each.tensor.nbytes for each in parameters if each.form is None)
    return f"{(line.bytes - others) / matrices:.4g}"


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_tiny")
    parser.add_argument("--steps", type=int, default=2 * INTERVAL + 1)
    parser.add_argument("--short", action="store_true", help="a few cases, of a tiny model")
    parser.add_argument("--write", action="store_true", help="also into docs/speed.md")
    options = parser.parse_args(arguments)
    if options.short:
        options.steps = INTERVAL + 1
    cases = SHORT if options.short else CASES
    lines = [
        f"{options.model}, float32: {provenance(__file__, arguments, torch.device('cpu'))}",
        "",
        "| processes | overrides | step | what | operation | calls | bytes | median, ms | least, ms | of matrices | "
        "weights differ by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for processes, overrides in cases:
        rows = table(processes, overrides, options)
        lines += rows
        print("\n".join(rows), flush=True)
    return show("collectives", "\n".join(lines), write=options.write)


if __name__ == "__main__":
    main()
