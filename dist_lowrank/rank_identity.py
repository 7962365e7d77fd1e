"""All ranks must run the same configuration, code and library versions; compared before the first collective."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lowrank.config import RunConfig, by_dotted_key, to_dict
from dist_lowrank.config.run_folder import versions
from dist_lowrank.exit_codes import RanksDiffer

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]


def identity(config: RunConfig, overrides: Sequence[str] = ()) -> dict[str, str]:
    """What must be equal on all ranks, by name.

    Args:
        overrides: what was typed on this rank's machine, where each machine has a command of its own.
    """
    return {
        "command": " ".join(overrides),
        "code of dist_lowrank": _hash_of_source(),
        **{f"version of {name}": str(version) for name, version in versions().items()},
        **{key: json.dumps(value) for key, value in by_dotted_key(to_dict(config))},
    }


def compare_ranks(store: Store, rank: int, world_size: int, own: dict[str, str], timeout_seconds: float) -> None:
    """Compares identities through the store, which works also between versions that could not talk otherwise.

    Raises:
        RanksDiffer: on every rank, naming the ranks that differ from rank 0 and in what, or that did not come.
    """
    store.set_timeout(timedelta(seconds=timeout_seconds))
    store.set(f"identity/{rank}", json.dumps(own))
    if rank == 0:
        verdict = _verdict(store, world_size, own, timeout_seconds)
        store.set("identity/verdict", verdict)
        if verdict:  # this rank may be the host of the store, and is about to end
            told = [f"identity/told/{other}" for other in range(1, world_size)]
            _wait(store, told, min(timeout_seconds, 10))
    else:
        verdict = store.get("identity/verdict").decode()
        store.set(f"identity/told/{rank}", "")
    if verdict:
        raise RanksDiffer(verdict)


def _verdict(store: Store, world_size: int, own: dict[str, str], timeout_seconds: float) -> str:
    if not _wait(store, [f"identity/{rank}" for rank in range(world_size)], timeout_seconds):
        missing = [str(rank) for rank in range(world_size) if not store.check([f"identity/{rank}"])]
        return f"rank {', '.join(missing)} of {world_size} did not start within {timeout_seconds:.0f} seconds"
    lines = []
    for rank in range(1, world_size):
        other = json.loads(store.get(f"identity/{rank}"))
        differences = [
            f"{name} {_shown(other, name)} (rank 0: {_shown(own, name)})"
            for name in {**own, **other}
            if own.get(name) != other.get(name)
        ]
        if differences:
            lines.append(f"rank {rank} differs from rank 0: {', '.join(differences)}")
    return "\n".join(lines)


def _wait(store: Store, keys: list[str], timeout_seconds: float) -> bool:
    if not keys:
        return True
    try:
        store.wait(keys, timedelta(seconds=timeout_seconds))
    except RuntimeError:
        return False
    return True


def _shown(values: dict[str, str], name: str) -> str:
    return values.get(name) or "nothing"


def _hash_of_source() -> str:
    """12 hexadecimal digits over the names and contents of this package's files."""
    root, found = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]
