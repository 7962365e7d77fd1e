"""GPUs as their driver shows them: `nvidia-smi` is asked, so that neither torch nor CUDA starts."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_lowrank.doctor.items import Item

_FIELDS = ("name", "driver_version", "memory.total", "ecc.errors.uncorrected.volatile.total")
_SECONDS = 20  # nvidia-smi takes some on a node with many GPUs and no persistence daemon


@dataclass(frozen=True, slots=True)
class Gpu:
    """One line of nvidia-smi."""

    name: str
    driver: str
    memory: str  # with its unit
    memory_errors: str  # uncorrected ones since the driver was loaded; [N/A] without ECC


def list_gpus() -> list[Gpu] | str:
    """The GPUs of this machine, or what is wrong with them; an empty list where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError:
        return "nvidia-smi is not there, though GPUs are" if _devices() else []
    except subprocess.TimeoutExpired:
        return f"nvidia-smi does not answer within {_SECONDS} s"
    if done.returncode != 0:
        return f"nvidia-smi: {(done.stdout + done.stderr).strip() or done.returncode}"
    return [Gpu(*(field.strip() for field in line.split(","))) for line in done.stdout.splitlines() if line.strip()]


def check_gpus(gpus: Sequence[Gpu] | str, expected: int | None = None) -> list[Item]:
    """Whether all GPUs answer, with one driver and without memory errors.

    Args:
        gpus: from `list_gpus`.
        expected: how many there should be; None: as many as there are device files.
    """
    driver_remedy = "look at dmesg for Xid errors; load the driver again or restart the node"
    container_remedy = "docker run --gpus all, with the NVIDIA container toolkit on the host"
    if isinstance(gpus, str):
        return [Item("gpus", "failed", gpus, f"{driver_remedy}; in a container: {container_remedy}")]
    wanted = len(_devices()) if expected is None else expected
    if len(gpus) < wanted:
        return [
            Item("gpus", "failed", f"{len(gpus)} answer, {wanted} should", f"{driver_remedy}; or {container_remedy}")
        ]
    if not gpus:
        return [Item("gpus", "ok", "none: ranks compute on cores and talk over gloo")]
    kinds = dict.fromkeys(f"{gpu.name} ({gpu.memory})" for gpu in gpus)
    items = [Item("gpus", "ok", f"{len(gpus)} x {', '.join(kinds)}")]
    if len(kinds) > 1:
        items = [
            Item("gpus", "warning", f"{len(gpus)} of several kinds: {', '.join(kinds)}", "the slowest sets the pace")
        ]
    items.append(Item("driver", "ok", gpus[0].driver))
    broken = [
        f"{number} has {gpu.memory_errors}"
        for number, gpu in enumerate(gpus)
        if gpu.memory_errors.isdigit() and int(gpu.memory_errors) > 0
    ]
    if broken:
        remedy = "drain the node; nvidia-smi -q -d ECC,ROW_REMAPPER tells whether a restart repairs it"
        items.append(Item("gpu memory", "failed", f"uncorrected errors: GPU {', '.join(broken)}", remedy))
    return items


def _devices() -> list[Path]:
    return list(Path("/dev").glob("nvidia[0-9]*"))
