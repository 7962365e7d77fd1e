"""Whether this torch fits this machine's GPUs. Imports torch, but starts no CUDA context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_lowrank.config.run_folder import versions
from dist_lowrank.doctor.gpus import Gpu
from dist_lowrank.doctor.items import Item


@dataclass(frozen=True, slots=True)
class Build:
    """What this node computes with."""

    versions: dict[str, str | None]  # have to be equal on all nodes
    gpus: int  # that torch can use


def build(gpus: Sequence[Gpu] | str) -> Build:
    import torch

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = versions() | {"cuda": torch.version.cuda, "nccl": _nccl()}
    return Build(found | {"driver": gpus[0].driver if gpus and not isinstance(gpus, str) else None}, usable)


def check_torch(found: Build, gpus: Sequence[Gpu] | str) -> Item:
    """Whether torch can use the GPUs that the driver shows."""
    present = 0 if isinstance(gpus, str) else len(gpus)
    cuda, torch_version = found.versions["cuda"], found.versions["torch"]
    text = f"torch {torch_version}, " + (f"CUDA {cuda}, NCCL {found.versions['nccl']}" if cuda else "without CUDA")
    if found.gpus >= present:
        return Item("torch", "ok", text)
    if cuda is None:
        remedy = "pip install torch for CUDA: https://pytorch.org/get-started/locally"
        return Item("torch", "failed", f"{text}, on a machine with {present} GPUs", remedy)
    remedy = "a driver for this CUDA or a torch for this driver; CUDA_VISIBLE_DEVICES hides GPUs too"
    driver = found.versions["driver"]
    return Item("torch", "failed", f"{text}: can use {found.gpus} of {present} GPUs with driver {driver}", remedy)


def _nccl() -> str | None:
    import torch

    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
