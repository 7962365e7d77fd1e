"""Dictionaries that all matrices of a role learn together: as a reference says, under every sharding, and resumed."""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collectives import CountCollectives
from processes import run_on_ranks
from references import ReferenceDCTAdamW, ReferenceTrion, initial_weight, prescribed_gradients
from sharded_models import Model, full, gradients, joined, placed_as, random_cuts, shard
from shared_references import SharedFira, SharedFrugal, SharedGaLore, SharedReference
from torch import Tensor
from torch.nn import Parameter

from dist_lowrank.optim import DCTAdamW, Fira, Frugal, GaLore, Trion
from dist_lowrank.optim.state_dict import full_state_dict
from dist_lowrank.optim.traffic import collectives_of_step
from dist_lowrank.sharding.exchanged import FlatSlice
from dist_lowrank.sharding.pieces import FlatPart

# On gloo, by the words of torch.distributed.
NAMES = {"all_reduce": "allreduce_", "all_gather": "allgather_", "all_to_all": "alltoall_base_"}
STEPS = 20
# Tall, wide and square; the residual stream has four readers, o and down a role each.
MATRICES = {
    "layers.0.q.weight": (8, 8),
    "layers.0.o.weight": (8, 8),
    "layers.0.up.weight": (13, 8),
    "layers.0.down.weight": (8, 13),
    "layers.1.q.weight": (8, 8),
    "layers.1.o.weight": (8, 8),
    "layers.1.up.weight": (13, 8),
    "layers.1.down.weight": (8, 13),
}
ROLES = [
    [f"layers.{layer}.{name}.weight" for layer in (0, 1) for name in names]
    for names in (("q", "up"), ("o",), ("down",))
]
ADAM = {"lr": 0.02, "weight_decay": 0.1, "rank": 3, "refresh_interval": 3}
FAMILY = {"lr": 0.01, "rank": 3, "betas": (0.9, 0.999), "eps": 1e-6, "refresh_interval": 3}
# Optimizer and options; reference and options; how near.
METHODS: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any], float]] = {
    "dct_adamw": (DCTAdamW, ADAM, ReferenceDCTAdamW, ADAM, 1e-10),
    "dct_adamw_feedback": (
        DCTAdamW,
        ADAM | {"error_feedback": "fp32", "error_feedback_momentum": True},
        ReferenceDCTAdamW,
        ADAM | {"error_feedback": "fp32", "error_feedback_momentum": True},
        1e-5,  # what is stored in float32 rounds in float32
    ),
    "dct_adamw_reset": (
        DCTAdamW,
        ADAM | {"transition": "reset", "column_bias_correction": True},
        ReferenceDCTAdamW,
        ADAM | {"transition": "reset", "column_bias_correction": True},
        1e-10,
    ),
    "trion": (Trion, {"rank": 3}, ReferenceTrion, {"rank": 3}, 1e-10),
    "galore_moved": (
        GaLore,
        FAMILY | {"transition": "move"},
        SharedGaLore,
        FAMILY | {"alpha": 0.25, "transition": "move"},
        1e-10,
    ),
    "fira": (Fira, FAMILY, SharedFira, FAMILY | {"alpha": 0.25, "corrected_eps": False, "inside": 0.0}, 1e-10),
    "frugal": (Frugal, FAMILY, SharedFrugal, FAMILY | {"transition": "reset", "kappa": 1.0}, 1e-10),
}


def _options(optimizer: Any, options: dict[str, Any], interval: int) -> dict[str, Any]:
    own = {"dictionary": "shared"} if optimizer in (DCTAdamW, Trion) else {"subspace": "shared"}
    return {**options, **own, "dictionary_interval": interval}


def _gradients() -> list[dict[str, Tensor]]:
    by_name = {
        name: prescribed_gradients(shape, STEPS, seed=index) for index, (name, shape) in enumerate(MATRICES.items())
    }
    return [{name: gradients[step] for name, gradients in by_name.items()} for step in range(STEPS)]


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_over_four_dictionaries_equal_the_reference(method: str) -> None:
    make, options, reference, its_options, tolerance = METHODS[method]
    named = {name: Parameter(initial_weight(shape, seed=i)) for i, (name, shape) in enumerate(MATRICES.items())}
    optimizer = make(list(named.items()), **_options(make, options, 6))
    eye = {"dictionary": torch.eye(8, dtype=torch.float64)} if make in (DCTAdamW, Trion) else {}
    expected = SharedReference(
        {name: reference(p, **its_options, **eye) for name, p in named.items()}, ROLES, 6, make not in (DCTAdamW, Trion)
    )
    for step, by_name in enumerate(_gradients(), start=1):
        for name, parameter in named.items():
            parameter.grad = by_name[name].clone()
        optimizer.step()
        expected.step(by_name)
        for name, parameter in named.items():
            difference = float((parameter.detach() - expected.references[name].weight).abs().max())
            assert difference <= tolerance, f"{name}, step {step}: off by {difference}"
    kept = {name for name, p in named.items() if "dictionary" in optimizer.state[p]}
    assert kept == {role[0] for role in ROLES}


# Uneven and empty shards, left sides, two matrices or one to a role, and parameters on the dense path.
SHAPES = {
    "q0.weight": (10, 6),
    "q1.weight": (7, 6),
    "few0.weight": (3, 2),
    "few1.weight": (3, 2),
    "wide0.weight": (5, 12),
    "wide1.weight": (5, 8),
    "square.weight": (8, 8),
    "one.weight": (1, 8),
    "norm.weight": (6,),
    "bias.weight": (1,),
}
SHARDED_STEPS, INTERVAL, SAVED_AFTER = 12, 4, 6
COMMON: dict[str, Any] = {"lr": 0.01, "rank": 0.5, "verify_every": 3}
SHARDED: dict[str, tuple[Any, dict[str, Any]]] = {
    "dct_adamw": (
        DCTAdamW,
        {"refresh_interval": 2, "error_feedback": "fp32", "error_feedback_momentum": True, "dictionary": "shared"},
    ),
    "trion": (Trion, {"dictionary": "shared"}),
    "fira": (Fira, {"refresh_interval": 2, "subspace": "shared", "transition": "move"}),
}
Cuts = dict[str, tuple[int, int]]  # by name: the elements that this rank has of it in the flat tensor


def _make(method: str, named: list[tuple[str, Parameter]], **options: Any) -> Any:
    make, own = SHARDED[method]
    return make(named, **COMMON, **own, dictionary_interval=INTERVAL, **options)


def _in_one(values: dict[str, Tensor], own: Cuts) -> Tensor:
    """One flat tensor with this rank's part of each, as DeepSpeed makes it."""
    return torch.cat([values[name].detach().flatten()[slice(*cut)] for name, cut in own.items()])


def _broken_run(rank: int, strategy: str, world_size: int, method: str, workspace_bytes: int) -> Any:
    """Weights at the end of a run that was saved and resumed within an interval, its dictionaries, keys and traffic."""
    model, flat, own = Model(SHAPES, torch.float64), None, {}
    if strategy == "flat":
        cuts = random_cuts(SHAPES, world_size)
        own = {name: each[rank] for name, each in cuts.items()}
        flat = Parameter(_in_one(dict(model.named_parameters()), own))
        positions = accumulate((stop - start for start, stop in own.values()), initial=0)
        parts = [
            FlatPart(name, position, tuple(FlatSlice(SHAPES[name], *cut) for cut in cuts[name]))
            for name, position in zip(own, positions, strict=False)
        ]
        named = [("flat", flat)]
    else:
        shard(model, strategy, world_size, COMMON["rank"])
        named = list(model.named_parameters())

    def fresh() -> Any:
        updater = _make(method, named, workspace_bytes=workspace_bytes)
        if flat is not None:
            updater.declare_flat_parts({flat: parts}, dist.group.WORLD)
        return updater

    updater, traffic = fresh(), []
    for step in range(1, SHARDED_STEPS + 1):
        whole = gradients(step, SHAPES, torch.float64)
        for name, parameter in named:
            parameter.grad = _in_one(whole, own) if flat is not None else placed_as(parameter, whole[name])
        recipe = updater.recipe(updater.param_groups[0])
        changes = (step - recipe.refresh_after_first) % INTERVAL == 0
        predicted = collectives_of_step(updater, refresh=recipe.refreshes(step), dictionaries=changes)
        with CountCollectives() as counter:
            updater.step()
        if step not in (1, SAVED_AFTER + 1) and updater._steps % COMMON["verify_every"]:  # those compare ranks, too
            calls = zip(counter.calls, counter.sent_bytes, strict=True)
            sent = [(name, elements, size) for (name, elements), size in calls]
            traffic.append(([(NAMES[each.operation], each.elements, each.bytes) for each in predicted], sent))
        if step == SAVED_AFTER:
            saved = full_state_dict(updater)
            updater = fresh()
            updater.load_state_dict(saved)
    if flat is None:
        weights = {name: full(p) for name, p in named}
    else:
        held = torch.split(flat.detach(), [stop - start for start, stop in own.values()])
        weights = {name: joined(part, SHAPES[name]) for name, part in zip(own, held, strict=True)}
    states = [(name, key, value) for name, p in named for key, value in updater.state[p].items()]
    learned = [value.clone() for _, key, value in states if key.endswith("dictionary")]
    return weights, learned, [(name, key) for name, key, _ in states], traffic


def _broken_runs(rank: int, world_size: int, strategies: list[str]) -> dict[Any, Any]:
    return {
        (strategy, method): _broken_run(rank, strategy, world_size, method, 2**20 if method == "fira" else 700)
        for strategy in strategies
        for method in SHARDED
    }


@cache
def _unbroken(method: str) -> dict[str, Tensor]:
    model = Model(SHAPES, torch.float64)
    updater = _make(method, list(model.named_parameters()))
    for step in range(1, SHARDED_STEPS + 1):
        for name, gradient in gradients(step, SHAPES, torch.float64).items():
            model.get_parameter(name).grad = gradient
        updater.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("world_size", "strategies"),
    [
        (1, ["ddp", "fsdp", "flat"]),
        (2, ["ddp", "fsdp", "fsdp_rows", "flat"]),
        (4, ["ddp", "fsdp", "fsdp_rows", "flat", "hsdp"]),
    ],
)
def test_sharded_and_resumed_within_an_interval_equals_one_unbroken_process(
    world_size: int, strategies: list[str]
) -> None:
    by_rank = run_on_ranks(world_size, _broken_runs, world_size, strategies)
    for case in by_rank[0]:
        tolerance = 1e-5 if case[1] == "dct_adamw" else 1e-9  # error feedback in float32
        for weights, learned, keys, traffic in (runs[case] for runs in by_rank):
            for name, expected in _unbroken(case[1]).items():
                difference = float((weights[name] - expected).abs().max())
                assert difference <= tolerance, f"{case}, {name}: off by {difference}"
            assert keys == by_rank[0][case][2]
            assert len(learned) == 5  # q, few, wide, square, one
            for own, first in zip(learned, by_rank[0][case][1], strict=True):
                assert torch.equal(own, first)
                torch.testing.assert_close(own @ own.T, torch.eye(len(own), dtype=own.dtype))
            assert len(traffic) >= 5
            for predicted, sent in traffic:
                assert predicted == sent, case
