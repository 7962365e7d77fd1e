"""Checks of this machine that need nothing of torch: packages, limits, memory, disk."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from dist_lowrank.doctor.gpus import Gpu, check_gpus
from dist_lowrank.doctor.items import Item

_GIB = 2**30
_SHARED_MEMORY_BYTES = _GIB  # what NCCL and a few loader workers need; Docker's default of 64 MiB ends in a bus error
_OPEN_FILES = 4096
_NEEDED = ("torch", "transformers", "datasets", "hydra-core", "pydantic")


@dataclass(frozen=True, slots=True)
class Expectations:
    """What the user wants of a node."""

    runs: str = "runs"  # where runs will be written
    min_free_gib: float = 10.0  # there
    gpus: int | None = None  # None: any number


def check_machine(expected: Expectations, gpus: Sequence[Gpu] | str) -> list[Item]:
    """All of them; `gpus` are `gpus.list_gpus()`."""
    return [
        check_packages(),
        *check_gpus(gpus, expected.gpus),
        check_shared_memory(needed=bool(gpus)),
        check_locked_memory(),
        check_open_files(),
        check_disk(expected.runs, expected.min_free_gib),
    ]


def check_packages() -> Item:
    """Whether what a training imports is installed."""
    versions, missing = [f"python {platform.python_version()}"], []
    for package in (*_NEEDED, "deepspeed"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            if package in _NEEDED:
                missing.append(package)
    if missing:
        return Item("packages", "failed", f"not installed: {', '.join(missing)}", "pip install 'dist-lowrank[train]'")
    return Item("packages", "ok", ", ".join(versions))


def check_shared_memory(*, needed: bool, path: str = "/dev/shm", least_bytes: int = _SHARED_MEMORY_BYTES) -> Item:
    """NCCL's transport inside a node and the loader's workers pass data through it."""
    try:
        size_bytes = shutil.disk_usage(path).total
    except OSError as error:
        return Item("shared memory", "warning", f"{path}: {error.strerror}", "mount a tmpfs there")
    found = f"{path} holds {_size(size_bytes)}"
    if size_bytes >= least_bytes:
        return Item("shared memory", "ok", found)
    remedy = (
        "docker run --shm-size=8g (or --ipc=host); in Kubernetes an emptyDir with medium: Memory, mounted at /dev/shm"
    )
    return Item("shared memory", "failed" if needed else "warning", f"{found}, less than {_size(least_bytes)}", remedy)


def check_locked_memory(infiniband: Path = Path("/dev/infiniband")) -> Item:
    """InfiniBand registers buffers, which locks them in memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    found = "unlimited" if unlimited else f"at most {_size(soft)}"
    if not infiniband.is_dir():
        return Item("locked memory", "ok", f"{found}; no InfiniBand device here needs more")
    if unlimited:
        return Item("locked memory", "ok", found)
    remedy = (
        "ulimit -l unlimited; docker run --ulimit memlock=-1; LimitMEMLOCK=infinity in slurmd.service, "
        "and PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
    )
    return Item("locked memory", "failed", f"{found}, and {infiniband} is there", remedy)


def check_open_files(least: int = _OPEN_FILES) -> Item:
    """Each connection to another rank and each shard of data takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= least:
        return Item("open files", "ok", f"at most {soft:,}" if soft != resource.RLIM_INFINITY else "unlimited")
    allowed = least if hard == resource.RLIM_INFINITY else min(least, hard)
    remedy = f"ulimit -n {allowed}; docker run --ulimit nofile=65536"
    return Item("open files", "warning", f"at most {soft:,}, less than {least:,}", remedy)


def check_disk(runs: str, min_free_gib: float) -> Item:
    """Whether the folder of runs can be written, and has room for checkpoints."""
    folder = Path(runs).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is no folder" if not there.is_dir() else "cannot be written by this user"
        return Item("disk", "failed", f"{there}: {what}", "runs=FOLDER with a folder to write in (here: --runs FOLDER)")
    usage = shutil.disk_usage(there)
    if not usage.total:  # /proc and its like
        remedy = "runs=FOLDER with a folder on a disk (here: --runs FOLDER)"
        return Item("disk", "failed", f"{there}: is on no disk that holds files", remedy)
    found = f"{_size(usage.free)} of {_size(usage.total)} free for {runs}"
    if usage.free < min_free_gib * _GIB:
        remedy = "remove old runs, or checkpoint.keep_last=1, or runs=FOLDER on another disk (here: --runs FOLDER)"
        return Item("disk", "failed", f"{found}, less than {min_free_gib:g} GiB", remedy)
    return Item("disk", "ok", found)


def _size(count_bytes: int) -> str:
    for unit, size in (("GiB", _GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count_bytes >= size:
            return f"{count_bytes / size:,.1f}".removesuffix(".0") + f" {unit}"
    return f"{count_bytes} bytes"
