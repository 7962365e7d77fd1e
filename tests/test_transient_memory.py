"""A step needs, beside state, at most the workspace and the scratch of one matrix: measured, under every layout.

Measured are the allocations of torch's CPU allocator. The process group is torch's `fake` one, which sends nothing but
has the code allocate as in a real group, and lets one process stand for any rank of any number.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from allocations import Allocations, allocations_of
from processes import run_on_ranks
from test_sharded_trajectories import Model, random_cuts, shard
from torch import nn

from dist_lowrank.optim import (
    CAME,
    SCALE,
    SMMF,
    Adafactor,
    AdamW8bit,
    Apollo,
    DCTAdamW,
    Dion,
    Dion3,
    Fira,
    Frugal,
    GaLore,
    LDAdam,
    Muon,
    SubTrack,
    Trion,
)
from dist_lowrank.optim.rounding import CHUNK_ELEMENTS
from dist_lowrank.optim.shared_dictionary import kept_bytes
from dist_lowrank.optim.transient import held_bytes, scratch_bytes
from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.layouts import local
from dist_lowrank.sharding.pieces import FlatPart

# One matrix alone holds more than the smallest workspace, all together more than any but the last.
SHAPES: dict[str, tuple[int, ...]] = {
    f"{name}{number}.weight": shape
    for number in range(2)
    for name, shape in {"tall": (192, 128), "wide": (128, 256), "long": (320, 64), "square": (128, 128)}.items()
} | {"dense.weight": (256, 160), "norm.weight": (512,)}
DENSE = ("dense.weight",)
WORKSPACES_BYTES = (1, 2**18)
SMALL_BYTES = 4096  # counters and scalars
LAYOUTS = [  # and the rank that is measured
    ("ddp", 1, 0),
    ("ddp", 4, 0),
    ("fsdp", 4, 0),
    ("fsdp_rows", 3, 2),
    ("fsdp_rows", 8, 0),
    ("hsdp", 4, 0),
    ("flat", 3, 2),
]
BF16 = torch.bfloat16
OPTIMIZERS: dict[str, tuple[type[Any], dict[str, Any], torch.dtype]] = {
    "dct_adamw": (DCTAdamW, {"refresh_interval": 2, "column_bias_correction": True}, torch.float32),
    "all columns": (DCTAdamW, {"rank": 1.0}, torch.float32),
    "feedback fp32": (DCTAdamW, {"error_feedback": "fp32", "error_feedback_momentum": True}, torch.float32),
    "feedback int8": (DCTAdamW, {"error_feedback": "int8"}, torch.float32),
    "feedback int4": (DCTAdamW, {"error_feedback": "int4", "refresh_interval": 2}, torch.float32),
    "feedback int4, bf16 weights": (DCTAdamW, {"error_feedback": "int4"}, BF16),
    "moments int8": (DCTAdamW, {"moment_dtype": torch.int8}, torch.float32),
    "trion": (Trion, {}, torch.float32),
    "galore": (GaLore, {"refresh_interval": 2}, torch.float32),
    "fira": (Fira, {"refresh_interval": 2, "subspace": "randomized_svd"}, torch.float32),
    "frugal": (Frugal, {"refresh_interval": 2, "subspace": "dct2"}, torch.float32),
    "apollo": (Apollo, {"refresh_interval": 2}, torch.float32),
    "shared": (
        DCTAdamW,
        {
            "dictionary": "shared",
            "dictionary_interval": 4,
            "refresh_interval": 2,
            "error_feedback": "int8",
            "moment_dtype": torch.int8,
        },
        torch.float32,
    ),
    "apollo, bf16 weights": (Apollo, {"refresh_interval": 2}, BF16),
    "ldadam": (LDAdam, {}, torch.float32),
    "subtrack": (SubTrack, {"refresh_interval": 2, "rank": 0.75}, torch.float32),
    "fft": (DCTAdamW, {"transform": "fft", "materialize": False}, torch.float32),
    "fft, hadamard": (
        DCTAdamW,
        {"transform": "fft", "materialize": False, "dictionary": "hadamard", "refresh_interval": 2},
        torch.float32,
    ),
    "bf16 operands": (
        DCTAdamW,
        {"transform_precision": "bf16", "refresh_interval": 2, "error_feedback": "int8"},
        torch.float32,
    ),
    "bf16 operands and weights": (DCTAdamW, {"transform_precision": "bf16", "refresh_interval": 2}, BF16),
    "trion, bf16 operands": (Trion, {"transform_precision": "bf16", "weight_rounding": "stochastic"}, BF16),
    "frugal, bf16 operands": (Frugal, {"transform_precision": "bf16", "subspace": "dct2"}, torch.float32),
    "scale, embedding, bf16 weights": (SCALE, {"vocabulary": "embedding"}, BF16),
    "adafactor": (Adafactor, {}, torch.float32),
    "came": (CAME, {}, torch.float32),
    "smmf, bf16 weights": (SMMF, {}, BF16),
    "adamw8bit": (AdamW8bit, {}, torch.float32),
    "bf16 weights": (DCTAdamW, {}, BF16),
    "bf16 weights, stochastic": (DCTAdamW, {"weight_rounding": "stochastic"}, BF16),
    "muon": (Muon, {}, torch.float32),
    "dion": (Dion, {"moment_dtype": BF16, "rank": 0.5}, torch.float32),
    "dion3": (Dion3, {}, torch.float32),
}


def laid_out(
    rank: int, layout: str, world_size: int, kind: tuple[type[Any], dict[str, Any], torch.dtype], workspace_bytes: int
) -> tuple[Any, list[tuple[str, Any]], dict[str, Any]]:
    """An optimizer, as OPTIMIZERS has them, of a model that is sharded so; its parameters by name, and its options."""
    make, options, dtype = kind
    rank_of_subspace = {} if make in (CAME, SCALE, SMMF, Adafactor, AdamW8bit, Muon) else {"rank": 0.25}
    options = {"lr": 0.01, **rank_of_subspace, "workspace_bytes": workspace_bytes, "verify_every": 0, **options}
    of_groups = {"vocabulary": options.pop("vocabulary")} if "vocabulary" in options else {}
    model = Model(SHAPES, dtype)
    named: list[tuple[str, Any]]
    if layout == "flat":
        cuts = random_cuts(SHAPES, world_size)
        flat = {name: p.detach().flatten()[slice(*cuts[name][rank])] for name, p in model.named_parameters()}
        named = [(name, nn.Parameter(values)) for name, values in flat.items()]
    else:
        shard(model, layout, world_size, options.get("rank", 0.25))
        named = list(model.named_parameters())
    groups = [
        {"params": [(name, p) for name, p in named if name not in DENSE], **of_groups},
        {"params": [(name, p) for name, p in named if name in DENSE], "low_rank": False},
    ]
    updater = make(groups, **options)
    if layout == "flat":
        slices = {name: tuple(FlatSlice(SHAPES[name], *cut) for cut in cuts[name]) for name, _ in named}
        updater.declare_flat_parts({p: [FlatPart(name, 0, slices[name])] for name, p in named}, dist.group.WORLD)
    return updater, named, options


def stand_for(rank: int, world_size: int) -> None:
    """This process alone is that rank, in a group that sends nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size)
    send = dist.all_to_all_single
    # The fake group fills what it receives with what it sends, and refuses where that is nothing.
    dist.all_to_all_single = lambda received, sent, **options: (
        send(received, sent, **options) if len(sent) else dist.barrier(options["group"], async_op=True)
    )


def _steps(
    rank: int, layout: str, world_size: int, optimizer: str, workspace_bytes: int
) -> tuple[list[Allocations], int]:
    """What steps allocate, with and without refresh, and what is allowed; state and dictionaries were made before."""
    updater, named, options = laid_out(rank, layout, world_size, OPTIMIZERS[optimizer], workspace_bytes)
    dtype = named[0][1].dtype
    found = []
    for _, p in named:
        p.grad = torch.ones_like(p)
    updater.step()
    interval = options.get("dictionary_interval", options.get("refresh_interval", 1))
    for _ in range(interval):
        found.append(allocations_of(updater.step))
    jobs = [
        (matrix, updater.recipe(group))
        for group, members in zip(updater.param_groups, updater.bind(), strict=True)
        for bound in members
        for matrix in bound.matrices
    ]
    total = sum(held_bytes(*job) for job in jobs)
    of_matrices = max(min(workspace_bytes, total), *(held_bytes(*job) for job in jobs))
    of_matrices += max(scratch_bytes(*job) for job in jobs)
    of_matrices += kept_bytes(matrix for matrix, _ in jobs)
    of_dense = 0
    if dtype == BF16:
        elements = max(local(p.detach()).numel() for name, p in named if name in DENSE)
        of_dense = 2 * 4 * elements  # weight and gradient in float32
        if options.get("weight_rounding") == "stochastic":
            of_dense += 48 * min(elements, CHUNK_ELEMENTS)
    return found, max(of_matrices, of_dense) + SMALL_BYTES


def _measure(_: int, layout: str, world_size: int, rank: int) -> dict[tuple[str, int], tuple[list[Allocations], int]]:
    gc.collect()
    gc.freeze()  # what the tests have imported is garbage to nobody
    stand_for(rank, world_size)
    return {
        (optimizer, workspace_bytes): _steps(rank, layout, world_size, optimizer, workspace_bytes)
        for optimizer in OPTIMIZERS
        for workspace_bytes in WORKSPACES_BYTES
    }


@pytest.mark.parametrize(("layout", "world_size", "rank"), LAYOUTS)
def test_a_step_needs_at_most_the_workspace_and_one_matrix(layout: str, world_size: int, rank: int) -> None:
    (measured,) = run_on_ranks(1, _measure, layout, world_size, rank, distributed=False)
    for (optimizer, workspace_bytes), (steps, allowed_bytes) in measured.items():
        case = f"{layout} {world_size} rank {rank}, {optimizer}, workspace {workspace_bytes}"
        for found in steps:
            print(f"{case}: {found.peak_bytes / 2**10:.0f} KiB of {allowed_bytes / 2**10:.0f}")
            assert found.count > 50, case
            assert abs(found.remaining_bytes) < 20_000, case
            assert found.peak_bytes <= allowed_bytes, case


def test_without_a_limit_a_step_needs_more_than_is_allowed_with_a_small_workspace() -> None:
    # In one process, what is in lockstep is what is computed in one call.
    _, allowed_bytes = _steps(0, "ddp", 1, "muon", workspace_bytes=1)
    steps, _ = _steps(0, "ddp", 1, "muon", workspace_bytes=2**30)
    assert max(found.peak_bytes for found in steps) > allowed_bytes


def test_one_matrix_is_less_than_three_times_its_rows() -> None:
    updater = DCTAdamW([nn.Parameter(torch.zeros(640, 256))], rank=0.25)
    ((bound,),) = updater.bind()
    (matrix,) = bound.matrices
    recipe = updater.recipe(updater.param_groups[0])
    assert held_bytes(matrix, recipe) + scratch_bytes(matrix, recipe) < 3 * 640 * 256 * 4


def test_allocations_count_temporaries_also_within_kernels() -> None:
    values = torch.randn(1000, 100)
    row = 100 * 4

    def squared() -> None:
        values.square().sum(dim=0)

    def in_turn() -> None:
        for _ in range(5):
            torch.empty(1000)

    def all_at_once() -> None:
        assert len([torch.empty(1000) for _ in range(5)]) == 5

    kept = []
    assert allocations_of(squared) == Allocations(1000 * row + row, 0, 2)
    assert allocations_of(in_turn) == Allocations(4000, 0, 5)
    assert allocations_of(all_at_once) == Allocations(20_000, 0, 5)
    assert allocations_of(lambda: kept.append(torch.empty(1000))) == Allocations(4000, 4000, 1)
    # A stable sort of (100,) floats: values and int64 indices come out, and scratch inside.
    assert allocations_of(lambda: torch.argsort(values[0], stable=True)).peak_bytes >= 100 * (4 + 8)
