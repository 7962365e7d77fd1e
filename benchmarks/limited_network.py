"""What an optimizer's step costs on a slow network: bytes that a host really sends, and seconds.

    sudo python benchmarks/limited_network.py

Two hosts of network namespaces (tests/cluster/hosts.py) with a process each train the same model with every optimizer,
in turns, under DDP and FSDP2, once per bandwidth. Bytes are read from the interface around the optimizer's step and
around the whole step, all protocols and headers included. Beside them stands what the layouts declare beforehand
(`dist_lowrank.optim.traffic`). Seconds are of the slower host; all figures are medians. Writes a Markdown table.

`apart` are seconds of the optimizer's step, taken in turn with the others on the same model, where every collective is
waited for at once and no wave is cut so that another can hide behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from dist_lowrank.config import compose
from dist_lowrank.optim import engine, wave
from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.traffic import Collective, collectives_of_step
from dist_lowrank.sharding.turns import Activity, finish
from dist_lowrank.training.evaluate import next_token_loss
from dist_lowrank.training.model import build_model
from dist_lowrank.training.strategy import Strategy, make_strategy

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cluster.hosts import virtual_hosts, why_not

HOSTS = ("node0", "node1")
OPTIMIZERS = ("dct_adamw", "muon", "adamw")
STRATEGIES = ("ddp", "fsdp")
TOKENS = 256  # of a step and host: the network is measured, not the model


@dataclass(frozen=True)
class Measured:
    """Medians over steps; bytes of the first host, seconds of the slower one."""

    strategy: str
    optimizer: str
    parameters: int
    declared_bytes: int
    optimizer_bytes: int
    optimizer_seconds: float
    step_bytes: int
    step_seconds: float
    apart_seconds: float  # of the optimizer


def measure(rank: int, options: argparse.Namespace) -> list[Measured]:
    """One process of the benchmark, on its host."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(len(HOSTS)), GLOO_SOCKET_IFNAME="eth0")
    address = f"tcp://{HOSTS[0]}:29500"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(HOSTS))
    return [found for strategy in STRATEGIES for found in _measure_strategy(strategy, options)]


def _measure_strategy(name: str, options: argparse.Namespace) -> list[Measured]:
    trained = {optimizer: _strategy(name, optimizer, options) for optimizer in OPTIMIZERS}
    tokens = torch.randint(0, options.vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(dist.get_rank()))
    figures: dict[str, list[list[float]]] = {optimizer: [] for optimizer in OPTIMIZERS}
    for number in range(options.steps + 1):
        for optimizer, strategy in trained.items():
            found: dict[bool, list[float]] = {}
            for apart in (True, False) if number % 2 else (False, True):
                with _apart() if apart else nullcontext():
                    found[apart] = _step(strategy, tokens)
            if number:  # the first also compares replicas and makes the state
                figures[optimizer].append([*found[False], found[True][1]])
    return [
        Measured(
            name,
            optimizer,
            sum(parameter.numel() for parameter in strategy.model.parameters()),
            sum(map(_sent, _declared(strategy))),
            *(
                kind(statistics.median(column))
                for kind, column in zip((int, float, int, float, float), columns, strict=True)
            ),
        )
        for optimizer, strategy in trained.items()
        for columns in [zip(*figures[optimizer], strict=True)]
    ]


def _strategy(name: str, optimizer: str, options: argparse.Namespace) -> Strategy:
    vocabulary = f"model.config.vocab_size={options.vocabulary}"
    config = compose([f"model={options.model}", vocabulary, f"strategy={name}", f"optimizer={optimizer}"])
    torch.manual_seed(0)
    return make_strategy(config, build_model(config), torch.device("cpu"))


def _step(strategy: Strategy, tokens: torch.Tensor) -> list[float]:
    """Bytes and seconds of the optimizer's step, then of the whole step."""

    def compute_gradients() -> None:
        strategy.backward(next_token_loss(strategy.model, tokens), last=True)
        strategy.prepare()

    before = _measured(compute_gradients)
    optimizer = _measured(lambda: strategy.step(skip=False))
    return [*optimizer, *(sum(pair) for pair in zip(before, optimizer, strict=True))]


@contextmanager
def _apart() -> Iterator[None]:
    """Waves one after the other, as few as the workspace allows."""

    def one_by_one(activities: Sequence[Activity], _: int) -> None:
        for activity in activities:
            finish(activity.turns)

    with mock.patch.object(engine, "take_turns", one_by_one), mock.patch.object(wave, "MOST_WAVES", 1):
        yield


def _measured(action: Callable[[], object]) -> tuple[float, float]:
    """Bytes that this host sends, and seconds until the slower host is done."""
    dist.barrier()
    sent, started = _sent_bytes(), time.perf_counter()
    action()
    seconds = torch.tensor(time.perf_counter() - started)
    sent = _sent_bytes() - sent
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return sent, float(seconds)


def _sent_bytes() -> int:
    """All that this host has sent so far: of the namespace that this process is in."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("eth0:")).partition(":")[2].split()[8])


def _declared(strategy: Strategy) -> list[Collective]:
    """AdamW sends nothing."""
    return collectives_of_step(strategy.optimizer) if isinstance(strategy.optimizer, LowRankOptimizer) else []


def _sent(collective: Collective) -> float:
    """Bytes that a rank sends for a collective, by the usual algorithms; of an exchange, what it keeps is left out."""
    ranks = dist.get_world_size()
    share = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1, "all_to_all": (ranks - 1) / ranks}
    return collective.bytes * share[collective.operation]


def run_on_hosts(megabits_per_second: float, options: argparse.Namespace) -> list[Measured]:
    """Starts the processes on hosts with such a network; returns what the first one has measured."""
    limits = {"megabits_per_second": megabits_per_second, "latency_milliseconds": options.latency}
    with virtual_hosts(HOSTS, **limits) as hosts:
        command = [sys.executable, __file__, *sys.argv[1:], "--rank"]
        processes = [
            subprocess.Popen(hosts.command(host, [*command, str(rank)]), stdout=subprocess.PIPE, text=True)
            for rank, host in enumerate(HOSTS)
        ]
        printed = [process.communicate()[0] for process in processes]
        codes = [process.returncode for process in processes]
        if any(codes):
            raise RuntimeError(f"the processes on {', '.join(HOSTS)} ended with {codes}")
        return [Measured(**found) for found in json.loads(printed[0])]


def _row(megabits_per_second: float, found: Measured) -> str:
    sent = [f"{count / 1e6:.2f}" for count in (found.declared_bytes, found.optimizer_bytes, found.step_bytes)]
    seconds = [f"{each:.2f}" for each in (found.optimizer_seconds, found.step_seconds, found.apart_seconds)]
    cells = [
        f"{megabits_per_second:g}",
        found.strategy,
        found.optimizer,
        sent[0],
        sent[1],
        seconds[0],
        seconds[2],
        f"{found.optimizer_seconds / found.apart_seconds:.2f}",
        sent[2],
        seconds[1],
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_20m")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens, so that matrices are most of the model")
    parser.add_argument("--bandwidths", type=float, nargs="+", default=[100, 1000], help="Mbit/s, each way")
    parser.add_argument("--latency", type=float, default=2, help="milliseconds, one way")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        print(json.dumps([asdict(found) for found in measure(options.rank, options)]), flush=True)
        dist.barrier()
        os._exit(0)
    if reason := why_not():
        sys.exit(f"error: {reason}")
    print(f"load average before {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    results = [(bandwidth, found) for bandwidth in options.bandwidths for found in run_on_hosts(bandwidth, options)]
    print(f"load average after {os.getloadavg()[0]:.1f}", file=sys.stderr)
    print(
        f"{options.model}, {max(found.parameters for _, found in results) / 1e6:.1f}M parameters in fp32, two hosts, "
    )
    print(f"{options.latency:g} ms one way, {options.steps} steps; MB and seconds per step and host\n")
    heads = ("Mbit/s", "strategy", "optimizer", "declared MB", "sent by the optimizer", "seconds", "apart", "ratio")
    print(f"| {' | '.join((*heads, 'sent in all', 'seconds'))} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for bandwidth, found in results:
        print(_row(bandwidth, found))


if __name__ == "__main__":
    main()
