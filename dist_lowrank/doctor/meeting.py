"""All nodes together: they meet at a store on node 0, look at each other, and reduce a tensor.

Every node runs `meet` with the same list. Node 0 hosts the store, collects what the others found, and tells all of them
the whole; a node that does not come, or that stops to answer, is named. Keys in the store: `facts/N`, `done/N` and
`bye/N` of node N; `present`, `verdict` and the answers to `clock/N/...` of node 0.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dist_lowrank.doctor.all_reduce import Reduced, Task, disagreements, run_ranks
from dist_lowrank.doctor.items import Item, Status
from dist_lowrank.doctor.nodes import Place, check_reach, listen
from dist_lowrank.doctor.rendezvous import NoMeeting, host_store, join_store, lost
from dist_lowrank.doctor.torch_build import Build

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_SILENT = "it came and then fell silent"
_ASKS = 5  # for the time; the quickest answer counts
_MOST_SKEW_SECONDS = 1.0
_RANKS_ON_CORES = 2  # of a single node without GPUs


@dataclass(frozen=True, slots=True)
class Facts:
    """What the others have to know of a node."""

    items: Sequence[Item]
    build: Build
    port: int  # at which it listens, to be reached

    @classmethod
    def read(cls, text: bytes) -> Facts:
        data = json.loads(text)
        return cls([Item(**item) for item in data["items"]], Build(**data["build"]), data["port"])


def meet(place: Place, own: Sequence[Item], build: Build, least_gigabytes_per_second: float | None) -> list[Item]:
    """Meets the other nodes and checks all together.

    Args:
        own: what this node found out about itself.
        least_gigabytes_per_second: of the all-reduce; None: any.

    Returns:
        The items of all nodes and of all together, the same on every node; on a node that cannot reach the others, its
        own and why.
    """
    own = [replace(item, node=place.own) for item in own] if len(place.nodes) > 1 else list(own)
    try:
        if place.rank:
            store, port = join_store(place), place.port
        else:
            store, port, item = host_store(place)
            own += [item] if len(place.nodes) > 1 else []
        with listen(place, 0) as listener:
            facts = Facts(own, build, listener.getsockname()[1])
            store.set(f"facts/{place.rank}", json.dumps(asdict(facts)))
            if place.rank == 0:
                return _lead(place, store, port, facts, least_gigabytes_per_second)
            return _follow(place, store)
    except NoMeeting as error:
        return [*own, error.item]
    except RuntimeError:  # of the store: its host is gone
        return [*own, lost(place, place.nodes[0], _SILENT)]


def _lead(place: Place, store: Store, port: int, own: Facts, least: float | None) -> list[Item]:
    others = range(1, len(place.nodes))
    deadline = time.monotonic() + place.timeout_seconds
    present = [0, *(rank for rank in others if _comes(store, f"facts/{rank}", deadline - time.monotonic()))]
    facts = [own, *(Facts.read(store.get(f"facts/{rank}")) for rank in present[1:])]
    items = [item for each in facts for item in each.items]
    is_complete = len(present) == len(place.nodes)
    store.set("present", json.dumps([each.port for each in facts] if is_complete else None))
    if len(place.nodes) > 1:
        items.append(_presence(place, present))
    if is_complete:
        _tell_time(store, others, place.timeout_seconds)
        done: dict[int, Any] = {0: _look(place, store, port, facts)}
        deadline = time.monotonic() + place.timeout_seconds
        for rank in others:
            if _comes(store, f"done/{rank}", deadline - time.monotonic()):
                done[rank] = json.loads(store.get(f"done/{rank}"))
            else:
                items.append(lost(place, place.nodes[rank], _SILENT))
                present.remove(rank)  # nothing more is awaited of it
        items += [Item(**item) for rank in done for item in done[rank]["items"]]
        if len(place.nodes) > 1:
            items.append(_equal_versions(place, [each.build for each in facts]))
        items.append(_all_reduced(place, done, least))
    store.set("verdict", json.dumps([asdict(item) for item in items]))
    deadline = time.monotonic() + 5
    for rank in present[1:]:  # before this process, which hosts the store, ends
        _comes(store, f"bye/{rank}", deadline - time.monotonic())
    return items


def _follow(place: Place, store: Store) -> list[Item]:
    patience = timedelta(seconds=2 * place.timeout_seconds + 5)
    store.wait(["present"], patience)
    if json.loads(store.get("present")) is not None:
        facts = [Facts.read(store.get(f"facts/{rank}")) for rank in range(len(place.nodes))]
        store.set(f"done/{place.rank}", json.dumps(_look(place, store, place.port, facts)))
    store.wait(["verdict"], 2 * patience)
    items = [Item(**item) for item in json.loads(store.get("verdict"))]
    store.set(f"bye/{place.rank}", "")
    return items


def _comes(store: Store, key: str, seconds: float) -> bool:
    try:
        store.wait([key], timedelta(seconds=max(0.01, seconds)))
    except RuntimeError:
        return False
    return True


def _presence(place: Place, present: Sequence[int]) -> Item:
    missing = [node for rank, node in enumerate(place.nodes) if rank not in present]
    if not missing:
        return Item("nodes", "ok", f"all {len(present)} came")
    remedy = (
        f"start the same command there, with the same list and port; if it runs, let it reach {place.own} port "
        f"{place.port}"
    )
    return Item("nodes", "failed", f"not there within {place.timeout_seconds:g} s: {', '.join(missing)}", remedy)


def _look(place: Place, store: Store, port: int, facts: Sequence[Facts]) -> dict[str, Any]:
    """What every node does at the same time; what comes of it, as JSON can hold it."""
    items = []
    if place.rank:
        items.append(check_clock(*_clock(store, place.rank), place.own))
    if len(place.nodes) > 1:
        items.append(check_reach(place, [each.port for each in facts]))
    processes = [each.build.gpus or (_RANKS_ON_CORES if len(facts) == 1 else 1) for each in facts]
    first = Task(
        host=place.nodes[0],
        port=port,
        backend="nccl" if all(each.build.gpus for each in facts) else "gloo",
        rank=sum(processes[: place.rank]),
        world_size=sum(processes),
        local_rank=0,
        timeout_seconds=place.timeout_seconds,
    )
    reduced = run_ranks(first, processes[place.rank])
    return {
        "items": [asdict(item) for item in items],
        "backend": first.backend,
        "reduced": reduced if isinstance(reduced, str) else [asdict(each) for each in reduced],
    }


def _tell_time(store: Store, others: Sequence[int], seconds: float) -> None:
    """Answers each node's questions for the time, one node after the other."""
    for rank in others:
        for number in range(_ASKS):
            if not _comes(store, f"clock/{rank}/{number}/ask", seconds):
                break
            store.set(f"clock/{rank}/{number}/answer", repr(time.time()))


def _clock(store: Store, rank: int) -> tuple[float, float]:
    """Seconds that node 0's clock is ahead of this one, and how wrong that can be."""
    found = []
    for number in range(_ASKS):
        if number == 0:
            store.set(f"clock/{rank}/0/ask", "")
            store.wait([f"clock/{rank}/0/answer"])  # node 0 may be busy with others: this one does not count
            continue
        asked = time.time()
        store.set(f"clock/{rank}/{number}/ask", "")
        told = float(store.get(f"clock/{rank}/{number}/answer"))
        answered = time.time()
        found.append(((answered - asked) / 2, told - (asked + answered) / 2))
    uncertainty, ahead = min(found)
    return ahead, uncertainty


def check_clock(ahead_seconds: float, uncertainty_seconds: float, node: str) -> Item:
    """Whether a node's clock agrees with node 0's: logs, time limits and file times are read across nodes."""
    found = f"{-ahead_seconds * 1000:+,.1f} ms against node 0, to {uncertainty_seconds * 1000:,.1f} ms"
    if abs(ahead_seconds) - uncertainty_seconds <= _MOST_SKEW_SECONDS:
        return Item("clock", "ok", found, node=node)
    return Item("clock", "failed", found, "run chrony or systemd-timesyncd on all nodes; chronyc tracking", node)


def _equal_versions(place: Place, builds: Sequence[Build]) -> Item:
    first = builds[0].versions
    lines = []
    for name in dict.fromkeys(name for each in builds for name in each.versions):
        pairs = [(each.versions.get(name), node) for each, node in zip(builds, place.nodes, strict=True)]
        if others := [f"{version} on {node}" for version, node in pairs if version != first.get(name)]:
            lines.append(f"{name} {first.get(name)} on {place.own}, {', '.join(others)}")
    if not lines:
        return Item("versions", "ok", f"equal on all nodes: torch {first['torch']}, python {first['python']}")
    remedy = "the same image or environment on all nodes; training refuses ranks that differ"
    status: Status = "warning" if all(line.startswith("driver ") for line in lines) else "failed"
    return Item("versions", status, "; ".join(lines), remedy)


def _all_reduced(place: Place, done: dict[int, Any], least: float | None) -> Item:
    problems = [
        f"{place.nodes[rank] + ': ' if len(place.nodes) > 1 else ''}{each['reduced']}"
        for rank, each in done.items()
        if isinstance(each["reduced"], str)
    ]
    backend = done[0]["backend"]
    if problems or len(done) < len(place.nodes):
        remedy = (
            "NCCL_DEBUG=INFO tells what NCCL chose; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network; "
            "/dev/shm may be small"
        )
        return Item("all-reduce", "failed", f"{backend}: {'; '.join(problems) or 'not all nodes took part'}", remedy)
    found = [Reduced(**each) for rank in sorted(done) for each in done[rank]["reduced"]]
    if wrong := disagreements(found):
        return Item("all-reduce", "failed", f"{backend}: {', '.join(wrong)}", "a GPU, a link or memory that is broken")
    speed = min(each.gigabytes_per_second for each in found)
    text = (
        f"{found[0].bytes / 2**20:.0f} MiB over {len(found)} ranks ({backend}): {1000 * found[0].seconds:,.1f} ms, "
        f"{speed:,.2f} GB/s, equal bit by bit"
    )
    if least is not None and speed < least:
        remedy = "look at the links: nvidia-smi topo -m, ibstat, NCCL_DEBUG=INFO; other jobs on the network"
        return Item("all-reduce", "failed", f"{text}; less than {least:g} GB/s", remedy)
    return Item("all-reduce", "ok", text)
