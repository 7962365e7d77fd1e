"""`dist-lowrank doctor`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import TYPE_CHECKING

from dist_lowrank.exit_codes import ExitCode
from dist_lowrank.verbs import Verbs, add_verb

if TYPE_CHECKING:
    from dist_lowrank.doctor.items import Item
    from dist_lowrank.doctor.machine import Expectations

_EPILOG = """\
  dist-lowrank doctor                                    this machine, with an all-reduce over its GPUs or cores
  dist-lowrank doctor --quick                            in under 3 seconds, for a container's health check or a prolog
  dist-lowrank doctor --nodes node1,node2 --port 29400   the same command on every node; no ssh
  srun --ntasks-per-node=1 dist-lowrank doctor --nodes $(scontrol show hostnames | paste -sd,)

exit codes: 0 fit (there may be warnings), 2 refused options, 4 something failed
"""


_MOST = sys.float_info.max
_TINY = sys.float_info.min
_NUMBERS: dict[str, tuple[type[int] | type[float], float, float, str]] = {  # least, most
    "node_rank": (int, 0, _MOST, "a place in the list, from 0"),
    "port": (int, 1, 65535, "1 to 65535"),
    "timeout_seconds": (float, _TINY, 86400, "more than 0, at most 86400"),
    "min_free_gib": (float, 0, _MOST, "0 or more"),
    "gpus": (int, 0, _MOST, "a whole number from 0"),
    "min_bandwidth": (float, _TINY, _MOST, "more than 0"),
}


def add_doctor(verbs: Verbs) -> None:
    """Adds the verb to the command's parser."""
    summary = "check this machine, or all nodes together: limits, GPUs, names, ports, clocks, an all-reduce"
    parser = add_verb(verbs, "doctor", _doctor, summary, details=". Says what to do about what fails.", epilog=_EPILOG)
    option = parser.add_argument
    option("--quick", action="store_true", help="this machine alone, without torch and without an all-reduce")
    option("--json", action="store_true", help="print JSON")
    option("--nodes", metavar="A,B", help="all nodes, in the same order everywhere; the first one hosts the store")
    option("--node-rank", metavar="N", help="this node's place in the list; else the one with its address")
    option("--port", default="29400", metavar="N", help="of the rendezvous (default 29400)")
    option("--timeout-seconds", default="60", metavar="S", help="for all nodes to come (default 60)")
    option("--runs", default="runs", metavar="DIR", help="where runs will be written (default runs)")
    option("--min-free-gib", default="10", metavar="X", help="there (default 10)")
    option("--gpus", metavar="N", help="GPUs that this node should have (default: those it has device files of)")
    option("--min-bandwidth", metavar="GB/S", help="of the all-reduce, per rank")


def _doctor(options: argparse.Namespace) -> int:
    from dist_lowrank.config import ConfigError
    from dist_lowrank.doctor.items import as_json, as_text, is_fit
    from dist_lowrank.doctor.machine import Expectations

    if options.nodes is not None and not options.nodes:
        raise ConfigError("--nodes: '' is not allowed; allowed: each node once, such as node1,node2")
    for key in ("nodes", "min_bandwidth"):
        given = getattr(options, key)
        if options.quick and given is not None:
            raise ConfigError(f"{_flag(key)} {given}: is not allowed with --quick; allowed: one of the two")
    if options.node_rank is not None and options.nodes is None:
        raise ConfigError(f"--node-rank {options.node_rank}: is not allowed without --nodes; allowed: both")
    for key, (kind, least, most, allowed) in _NUMBERS.items():
        given = getattr(options, key)
        setattr(options, key, None if given is None else _number(key, given, kind, least, most, allowed))
    expected = Expectations(options.runs, options.min_free_gib, options.gpus)
    rank = 0
    if options.quick:
        items = quick(expected, options.port)
    else:
        rank, items = thorough(expected, options)
    if options.json:
        print(as_json(items))
    elif rank == 0 or not is_fit(items):
        print(as_text(items))
    else:
        print(f"fit: {len(items)} checks, which the first node prints")
    return ExitCode.FINISHED if is_fit(items) else ExitCode.UNFIT


def _number(key: str, given: str, kind: type[int] | type[float], least: float, most: float, allowed: str) -> float:
    from dist_lowrank.config import ConfigError

    try:
        number = kind(given)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise ConfigError(f"{_flag(key)}: {given or 'nothing'} is not allowed; allowed: {allowed}")
    return number


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def quick(expected: Expectations, port: int) -> list[Item]:
    """What a health check has time for."""
    from dist_lowrank.doctor.gpus import list_gpus
    from dist_lowrank.doctor.machine import check_machine
    from dist_lowrank.doctor.names import check_own_name, check_port

    return [*check_machine(expected, list_gpus()), check_own_name(), check_port(port)]


def thorough(expected: Expectations, options: argparse.Namespace) -> tuple[int, list[Item]]:
    """Everything, on this node and with the others; also returns this node's place.

    Raises:
        ConfigError: for a list of nodes that this machine has no place in.
    """
    from dist_lowrank.doctor.gpus import list_gpus
    from dist_lowrank.doctor.machine import check_machine
    from dist_lowrank.doctor.names import check_own_name, check_port
    from dist_lowrank.doctor.nodes import Place, check_names, find_place

    if options.nodes is None:
        place = Place(["127.0.0.1"], 0, 0, options.timeout_seconds)
    else:
        place = find_place(options.nodes.split(","), options.node_rank, options.port, options.timeout_seconds)

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # time-outs become items

    from dist_lowrank.doctor.meeting import meet
    from dist_lowrank.doctor.torch_build import build, check_torch

    gpus = list_gpus()
    found = build(gpus)
    items = [*check_machine(expected, gpus), check_torch(found, gpus)]
    if options.nodes is None:
        items += [check_own_name(), check_port(options.port)]
    else:
        items += [check_own_name(others=not place.is_one_machine), check_names(place)]
    return place.rank, meet(place, items, found, options.min_bandwidth)
