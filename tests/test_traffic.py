"""What `collectives_of_step` predicts is what real steps send: operations, elements and bytes, under every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from collectives import CountCollectives
from processes import run_on_ranks
from test_pieces import build as build_pieces
from test_pieces import feed as feed_pieces
from test_sharded_trajectories import SHAPES, Model, random_cuts, shard
from torch import nn

from dist_lowrank.optim import Apollo, DCTAdamW, Dion, Dion3, Fira, GaLore, LDAdam, Muon, SubTrack, Trion
from dist_lowrank.optim.traffic import collectives_of_step, jobs_of
from dist_lowrank.optim.transient import held_bytes
from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.pieces import FlatPart

LAYOUTS = [("ddp", 3), ("fsdp", 2), ("fsdp", 4), ("fsdp_rows", 3), ("hsdp", 4), ("flat", 3)]
OPTIMIZERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "dct_adamw": (DCTAdamW, {"rank": 0.5, "refresh_interval": 3, "error_feedback": "int8"}),
    "trion": (Trion, {"rank": 0.25, "newton_schulz_steps": 7}),  # two sums of Gram matrices
    "galore": (GaLore, {"rank": 0.25, "refresh_interval": 3}),
    "galore_staggered": (GaLore, {"rank": 0.25, "refresh_interval": 3, "refresh_stagger": True}),
    "fira": (Fira, {"rank": 0.25, "refresh_interval": 3, "subspace": "randomized_svd"}),
    "apollo_mini": (Apollo, {"rank": 1, "refresh_interval": 3, "per": "tensor"}),
    "ldadam": (LDAdam, {"rank": 0.25}),
    "subtrack": (SubTrack, {"rank": 0.25, "refresh_interval": 3}),
    "muon": (Muon, {}),
    "muon_bf16": (Muon, {"newton_schulz_dtype": torch.bfloat16, "side": "left"}),  # owners get half the bytes
    "dion": (Dion, {"rank": 0.25}),  # sums in two dtypes
    "dion3": (Dion3, {"rank": 0.25}),
    "operands": (DCTAdamW, {"rank": 0.5, "transform_precision": "bf16"}),  # rows and directions in two bytes
}
COLUMNS = ("dct_adamw", "trion")
OWNED = ("muon", "muon_bf16", "dion3")
CUT = [("ddp", 3), ("fsdp_rows", 3)]
SHARES_OF_WORKSPACE = (1.0, 0.75, 0.0)  # of what all matrices hold: one wave, several, one for each matrix
# On gloo; what a test compares is in words of torch.distributed.
NAMES = {"allreduce_": "all_reduce", "allgather_": "all_gather", "alltoall_base_": "all_to_all"}
Sent = list[tuple[str, int, int]]  # operation, elements, bytes


def _optimizer(rank: int, layout: str, world_size: int, optimizer: str, **options: Any) -> Any:
    make, defaults = OPTIMIZERS[optimizer]
    model = Model(SHAPES, torch.float32)
    model.narrow = nn.Module()
    model.narrow.weight = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16())
    model.wider = nn.Module()
    model.wider.weight = nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).double())
    if layout != "flat":
        # FSDP2 wants one dtype per unit.
        shard(model.narrow, layout, world_size, defaults.get("rank", 1.0))
        shard(model.wider, layout, world_size, defaults.get("rank", 1.0))
        shard(model, layout, world_size, defaults.get("rank", 1.0))
        return make(model.named_parameters(), **(defaults | options))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    cuts = random_cuts(shapes, world_size)
    named = [
        (name, nn.Parameter(p.detach().flatten()[slice(*cuts[name][rank])])) for name, p in model.named_parameters()
    ]
    updater = make(named, **defaults, **options)
    slices = {name: tuple(FlatSlice(shapes[name], *cut) for cut in cuts[name]) for name, _ in named}
    updater.declare_flat_parts({p: [FlatPart(name, 0, slices[name])] for name, p in named}, dist.group.WORLD)
    return updater


def _predicted_and_sent(
    rank: int, layout: str, world_size: int, optimizer: str, workspace_bytes: int
) -> list[tuple[Sent, Sent]]:
    """For steps 2 to 6 (the first also compares replicas), with refreshes among them, and verification at 4."""
    updater = _optimizer(rank, layout, world_size, optimizer, workspace_bytes=workspace_bytes, verify_every=4, lr=0.01)
    pairs = []
    for step in range(1, 7):
        for group in updater.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        refresh = updater.recipe(updater.param_groups[0]).refreshes(step)
        number = step if "refresh_stagger" in OPTIMIZERS[optimizer][1] else None
        predicted = collectives_of_step(updater, refresh=refresh, step=number, verification=step == 4)
        with CountCollectives() as counter:
            updater.step()
        if step > 1:
            pairs.append(
                (
                    [(each.operation, each.elements, each.bytes) for each in predicted],
                    [
                        (NAMES[name], elements, size)
                        for (name, elements), size in zip(counter.calls, counter.sent_bytes, strict=True)
                    ],
                )
            )
    return pairs


def _by_workspace(rank: int, *args: Any) -> list[list[tuple[Sent, Sent]]]:
    all_held_bytes = sum(held_bytes(*job) for job in jobs_of(_optimizer(rank, *args)))
    return [_predicted_and_sent(rank, *args, max(1, int(share * all_held_bytes))) for share in SHARES_OF_WORKSPACE]


def _elements(sent: Sent) -> int:
    return sum(elements for _, elements, _ in sent)


# Quick of OWNED and others.
WHOLE = {("ddp", "dion3"), ("fsdp_rows", "dion"), ("flat", "muon_bf16"), ("ddp", "operands"), ("fsdp_rows", "operands")}
QUICK = [
    (layout, name)
    for layout in LAYOUTS
    for name in OPTIMIZERS
    if ((layout[0], name) in WHOLE if name in (*OWNED, "dion", "operands") else name in COLUMNS or layout in CUT)
]


@pytest.mark.parametrize(
    ("layout", "world_size", "optimizer"),
    [
        pytest.param(*layout, name, marks=() if (layout, name) in QUICK else pytest.mark.slow)
        for layout in LAYOUTS
        for name in OPTIMIZERS
    ],
)
def test_predicted_collectives_are_those_that_a_step_sends(layout: str, world_size: int, optimizer: str) -> None:
    elements = []  # by rank and workspace
    for by_workspace in run_on_ranks(world_size, _by_workspace, layout, world_size, optimizer):
        for pairs in by_workspace:
            assert len(pairs) == 5
            for predicted, sent in pairs:
                assert sorted(predicted) == sorted(sent)  # two waves at a time
        # A small workspace sends the same in more calls.
        sent_at_refresh = [max((sent for _, sent in pairs), key=_elements) for pairs in by_workspace]
        # Few of the matrices of a staggered one are in the same step, and Muon holds too much for two in a small wave.
        if optimizer not in ("galore_staggered", "muon", "muon_bf16"):
            assert len({len(sent) for sent in sent_at_refresh}) == len(SHARES_OF_WORKSPACE)
        elements.append(list(map(_elements, sent_at_refresh)))
    by_workspace_size = zip(*elements, strict=True)
    if optimizer in OWNED:  # whoever owns a matrix
        by_workspace_size = zip(map(sum, zip(*elements, strict=True)), strict=True)
    assert len(set(by_workspace_size)) == 1


def _at_first_refresh_and_later(rank: int, layout: str, world_size: int) -> list[tuple[str, str, list[Sent]]]:
    """By optimizer and gradients: sent, and predicted as usual and at most, at steps 1, at which all choose, and 4."""
    found = []
    for name in ("galore", "subtrack", "ldadam"):
        for kind in ("full rank", "rank 1", "some of rank 1"):
            updater = _optimizer(rank, layout, world_size, name, workspace_bytes=2**24)
            updater.param_groups[0]["rank"] = 0.5  # several matrices have more than one direction
            for step in (1, 2, 3, 4):
                for position, parameter in enumerate(p for group in updater.param_groups for p in group["params"]):
                    narrow = kind == "rank 1" or (kind == "some of rank 1" and position % 2)
                    parameter.grad = torch.ones_like(parameter) if narrow else torch.randn_like(parameter)
                declared = [collectives_of_step(updater, step=step, at_most=at_most) for at_most in (False, True)]
                with CountCollectives() as counter:
                    updater.step()
                if step in (1, 4):
                    calls = zip(counter.calls, counter.sent_bytes, strict=True)
                    sent = [(NAMES[name], elements, size) for (name, elements), size in calls]
                    lists = [[(each.operation, each.elements, each.bytes) for each in one] for one in declared]
                    found.append((f"{name} {step}", kind, [sent, *lists]))
    return found


def test_gradients_of_a_low_rank_send_no_more_than_is_declared_as_the_most() -> None:
    for found in run_on_ranks(2, _at_first_refresh_and_later, "fsdp", 2):  # at which the first step compares nothing
        for case, kind, (sent, usual, at_most) in found:
            has_more = case in ("galore 1", "galore 4", "subtrack 1", "ldadam 1")  # an SVD
            assert (len(usual) < len(at_most)) == has_more, case
            if kind != "some of rank 1":
                assert sent == (usual if kind == "full rank" else at_most), (case, kind)
            else:
                assert len(sent) == len(at_most), case
                assert (_elements(usual) < _elements(sent) < _elements(at_most)) == has_more, case


def _summed(rank: int, stagger: bool) -> list[int]:
    """Elements summed at each step of an interval that is longer than there are matrices."""
    updater = _optimizer(rank, "fsdp", 2, "galore", refresh_interval=10, refresh_stagger=stagger)
    steps = [collectives_of_step(updater, step=step) for step in range(2, 12)]
    return [sum(each.elements for each in sent if each.purpose == "sums") for sent in steps]


def test_staggered_refreshes_sum_one_gram_matrix_at_a_time() -> None:
    at_once, in_turn = (run_on_ranks(2, _summed, stagger)[0] for stagger in (False, True))
    assert [bool(elements) for elements in at_once] == [False] * 9 + [True]
    squares = [min(shape) ** 2 for shape in (*SHAPES.values(), (6, 4), (4, 8)) if len(shape) == 2]
    assert sum(at_once) == sum(in_turn) == sum(squares)
    assert sorted(elements for elements in in_turn if elements) == sorted(squares)


def _purposes(rank: int, layout: str, world_size: int, optimizer: str) -> list[list[str]]:
    updater = _optimizer(rank, layout, world_size, optimizer)
    return [[each.purpose for each in collectives_of_step(updater, refresh=refresh)] for refresh in (True, False)]


@pytest.mark.parametrize(
    ("layout", "world_size", "optimizer", "refresh", "ordinary"),
    [
        ("fsdp", 4, "dct_adamw", {"sums"}, set()),
        ("fsdp", 4, "trion", {"sums"}, {"sums"}),
        ("ddp", 3, "dct_adamw", {"sums", "coefficients"}, {"coefficients"}),
        ("fsdp_rows", 3, "dct_adamw", {"rows", "sums", "updates"}, {"rows", "updates"}),
        ("flat", 3, "dct_adamw", {"rows", "sums", "updates"}, {"rows", "updates"}),
    ],
)
def test_a_layout_sends_only_what_it_is_for(
    layout: str, world_size: int, optimizer: str, refresh: set[str], ordinary: set[str]
) -> None:
    for found in run_on_ranks(world_size, _purposes, layout, world_size, optimizer):
        assert [set(purposes) for purposes in found] == [{"agreement"} | refresh, {"agreement"} | ordinary]


def _of_pieces(rank: int, strategy: str, world_size: int) -> list[tuple[Sent, Sent]]:
    model, updater = build_pieces(strategy, world_size, "dct_adamw", rank)
    pairs = []
    for step in range(1, 4):
        predicted = collectives_of_step(updater)
        with CountCollectives() as counter:
            feed_pieces(model, updater, strategy, world_size, rank, range(step, step + 1))
        calls = zip(counter.calls, counter.sent_bytes, strict=True)
        sent = [(NAMES[name], elements, size) for (name, elements), size in calls]
        pairs.append(([(each.operation, each.elements, each.bytes) for each in predicted], sent))
    return pairs[1:]


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("fsdp", 3), ("fsdp_last", 2), ("flat", 4)])
def test_predictions_hold_for_stacks_fused_weights_and_parts_of_flat_tensors(strategy: str, world_size: int) -> None:
    for pairs in run_on_ranks(world_size, _of_pieces, strategy, world_size):
        for predicted, sent in pairs:
            assert predicted == sent


def test_one_process_sends_nothing() -> None:
    model = Model(SHAPES, torch.float32)
    assert collectives_of_step(DCTAdamW(model.named_parameters()), verification=True) == []


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_group_of_one_process_sends_nothing(layout: str) -> None:
    assert run_on_ranks(1, _predicted_and_sent, layout, 1, "dct_adamw", 2**20) == [[([], [])] * 5]
