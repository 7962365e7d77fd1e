"""`dist-lowrank plan`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from dist_lowrank.exit_codes import ExitCode
from dist_lowrank.verbs import Verbs, add_verb

if TYPE_CHECKING:
    from dist_lowrank.config import RunConfig
    from dist_lowrank.planning.plan import Planner
    from dist_lowrank.planning.report import Verdict

DEFAULT_MARGIN = 0.1
_EPILOG = """\
examples:
  dist-lowrank plan model=llama_7b precision=bf16 --world-size 8 --device h100
  dist-lowrank plan model=llama_1b optimizer=galore strategy=zero2 precision=bf16 --world-size 16 --device 24GiB
  dist-lowrank plan --reconcile runs/llama_tiny-dct_adamw-3f0c62b1a9de

exit codes: 0 it fits, or nobody asked whether; 1 failed; 2 refused; 5 it does not fit the device
"""


def add_plan(verbs: Verbs) -> None:
    """Adds the verb to the command's parser."""
    summary = "tell the memory of every rank by cause, and what is sent, before anything starts; needs no GPU"
    parser = add_verb(verbs, "plan", _plan, summary, details=" (docs/planning.md).", epilog=_EPILOG)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as of `train`, such as model=llama_7b")
    parser._negative_number_matcher = re.compile(r"-\d")  # of -8GiB, too: a value, which is refused, and no option
    parser.add_argument("--world-size", metavar="N", help="ranks in all; default: as the launcher starts")
    parser.add_argument("--nodes", metavar="N", help="on which they are, for strategy=hsdp; default: 1")
    parser.add_argument(
        "--device", metavar="NAME", help="such as h100 or 80GiB; default: the GPU here, if there is one"
    )
    parser.add_argument("--margin", metavar="SHARE", help="left free; default: 0.1")
    parser.add_argument("--no-trace", action="store_true", help="leave out what is estimated: faster, no verdict")
    parser.add_argument("--json", action="store_true", help="print JSON, with every rank")
    parser.add_argument("--reconcile", metavar="RUN", help="compare the plan of a run with what it measured")


def _plan(options: argparse.Namespace) -> int:
    if options.reconcile is not None:
        return _reconcile(options)
    from dist_lowrank.config import ConfigError, compose

    if options.no_trace and options.device is not None:
        raise ConfigError(
            f"--device: {options.device} is not allowed with --no-trace, which tells no peak; allowed: one of both"
        )
    margin = _margin(options.margin)
    config, world_size, device_type = _resolve(compose(options.overrides), options)
    capacity = _capacity(options)  # refused before the work

    from dist_lowrank.planning.plan import Planner
    from dist_lowrank.planning.report import Report, as_json, print_report
    from dist_lowrank.planning.traffic import strategy_traffic
    from dist_lowrank.training.traffic_forecast import forecast_traffic

    planner = Planner(config, world_size, device_type, traced=not options.no_trace)
    plan = planner.plan()
    # Rows that DeepSpeed's cuts tear do not grow by block.
    by_block = not config.strategy.zero_stage
    sent = planner.estimate.traffic if planner.estimate and by_block else forecast_traffic(config, world_size)
    verdict = verdict_on(planner, *capacity, margin) if capacity and not options.no_trace else None
    report = Report(config, plan, verdict, sent, strategy_traffic(config, planner.parameters, world_size))
    with _ending_with_its_reader():
        if options.json:
            print(json.dumps(as_json(report), indent=1))
        else:
            print_report(report)
    return ExitCode.DOES_NOT_FIT if verdict is not None and not verdict.fits else ExitCode.FINISHED


def _resolve(config: RunConfig, options: argparse.Namespace) -> tuple[RunConfig, int, str]:
    """The configuration on the ranks that are asked for, their number, and the type of their device."""
    from dist_lowrank.config import ConfigError
    from dist_lowrank.launchers.preparation import check_sizes, planned_processes

    asked, nodes = _count("--world-size", options.world_size), _count("--nodes", options.nodes)
    if asked is None:
        device_type, world_size = planned_processes(config)
    else:
        device_type, world_size = config.launcher.device, asked
    if options.device is not None:
        device_type = "cuda"
    nodes = nodes or config.launcher.node_count
    if world_size % nodes:
        raise ConfigError(f"--nodes: {nodes} is not allowed with {world_size} ranks; allowed: a divisor of them")
    if config.strategy.name == "hsdp" and config.strategy.shard_size is None:
        config = replace(config, strategy=replace(config.strategy, shard_size=world_size // nodes))
    check_sizes(config, world_size, "launcher.nproc_per_node" if asked is None else "--world-size")
    return config, world_size, device_type


def _count(option: str, value: str | None) -> int | None:
    from dist_lowrank.config import ConfigError

    if value is None or (value.isdecimal() and int(value) > 0):
        return value if value is None else int(value)
    raise ConfigError(f"{option}: {value} is not allowed; allowed: an integer >= 1")


def _margin(value: str | None) -> float:
    from dist_lowrank.config import ConfigError

    if value is None:
        return DEFAULT_MARGIN
    try:
        margin = float(value)
    except ValueError:
        margin = -1.0
    if not 0 <= margin < 1:
        raise ConfigError(f"--margin: {value} is not allowed; allowed: a share of the device in [0, 1), such as 0.1")
    return margin


def _capacity(options: argparse.Namespace) -> tuple[str, int] | None:
    """Name and bytes of the device, if there is one to fit."""
    from dist_lowrank.planning.devices import capacity_bytes

    if options.device is not None:
        return options.device, capacity_bytes(options.device)
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory


def verdict_on(planner: Planner, device: str, capacity_bytes: int, margin: float) -> Verdict:
    """Whether the plan fits a device, and what else would."""
    from dist_lowrank.planning.fit import largest_micro_batch, largest_rank
    from dist_lowrank.planning.report import Verdict

    allowed_bytes, peak_bytes = int(capacity_bytes * (1 - margin)), int(planner.plan().peak_bytes.max())
    return Verdict(
        device,
        capacity_bytes,
        margin,
        allowed_bytes,
        peak_bytes,
        peak_bytes <= allowed_bytes,
        largest_micro_batch(planner, allowed_bytes),
        largest_rank(planner, allowed_bytes),
    )


def _reconcile(options: argparse.Namespace) -> int:
    from dist_lowrank.config import ConfigError, open_run

    named = ("world_size", "nodes", "device", "margin", "no_trace")
    ignored = [f"--{name.replace('_', '-')}" for name in named if getattr(options, name)] + options.overrides
    if ignored:
        raise ConfigError(
            f"{' '.join(ignored)}: is not allowed with --reconcile, which plans a run as it was; allowed: --json"
        )
    open_run(options.reconcile)  # refused before the slow imports

    from dist_lowrank.planning.reconcile import print_reconciled, reconcile

    found = reconcile(options.reconcile)
    with _ending_with_its_reader():
        if options.json:
            print(json.dumps(found.as_json(), indent=1))
        else:
            print_reconciled(found)
    return ExitCode.FINISHED


@contextmanager
def _ending_with_its_reader() -> Iterator[None]:
    """While it prints, a reader that has gone, such as `head`, ends this process as it ends other commands."""
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
        sys.stdout.flush()
    finally:
        signal.signal(signal.SIGPIPE, before)
