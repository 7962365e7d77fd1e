"""Dictionaries that all matrices of a role learn together: as a reference says, under every sharding, and resumed."""

from __future__ import annotations

import copy
import io
from functools import cache
from itertools import accumulate
from typing import Any
from unittest import mock

import pytest
import test_pieces
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
from dist_lowrank.optim.roles import role_of
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
    "fira": (
        Fira,
        FAMILY,
        SharedFira,
        FAMILY | {"alpha": 0.25, "corrected_eps": False, "inside": 0.0, "transition": "move"},
        1e-10,
    ),
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


def _broken_runs(rank: int, world_size: int, cases: list[tuple[str, str]]) -> dict[Any, Any]:
    return {
        (strategy, method): _broken_run(rank, strategy, world_size, method, 2**20 if method == "fira" else 700)
        for strategy, method in cases
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


ALL = ("ddp", "fsdp", "fsdp_rows", "flat")


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (1, [("fsdp", "dct_adamw"), ("flat", "fira")]),
        (2, [(strategy, method) for method in ("dct_adamw", "fira") for strategy in ALL]),
        (4, [("ddp", "fira"), ("fsdp_rows", "trion"), ("flat", "dct_adamw"), ("hsdp", "trion")]),
        pytest.param(
            4, [(strategy, method) for strategy in (*ALL, "hsdp") for method in SHARDED], marks=pytest.mark.slow
        ),
    ],
    ids=["1", "2", "4", "4, all"],
)
def test_sharded_and_resumed_within_an_interval_equals_one_unbroken_process(
    world_size: int, cases: list[tuple[str, str]]
) -> None:
    by_rank = run_on_ranks(world_size, _broken_runs, world_size, cases)
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


def _shared(named: Any, **options: Any) -> DCTAdamW:
    defaults = {"lr": 0.01, "rank": 3, "dictionary": "shared", "dictionary_interval": 4, "refresh_interval": 2}
    return DCTAdamW(named, **defaults | options)


def _pieces(rank: int, strategy: str, world_size: int) -> tuple[dict[str, Tensor], list[tuple[Any, Any]]]:
    """Stacks, fused weights and convolutions; `test_pieces` has them as columns of a fixed dictionary."""
    with mock.patch.dict(
        test_pieces.OPTIONS, {"dictionary": "shared", "dictionary_interval": 4, "refresh_interval": 2}
    ):
        model, updater = test_pieces.build(strategy, world_size, "dct_adamw", rank)
    traffic = []
    for step in range(1, 10):
        predicted = collectives_of_step(updater, refresh=step % 2 == 0, dictionaries=step % 4 == 0)
        with CountCollectives() as counter:
            test_pieces.feed(model, updater, strategy, world_size, rank, range(step, step + 1))
        traffic.append(([(NAMES[each.operation], each.elements) for each in predicted], counter.calls))
    return test_pieces.weights_of(model, strategy, world_size), traffic[1:]


@pytest.mark.parametrize(("strategy", "world_size"), [("fsdp", 2), ("fsdp_last", 3), ("flat", 3)])
def test_matrices_of_stacks_and_fused_weights_share_one_dictionary_under_every_sharding(
    strategy: str, world_size: int
) -> None:
    expected, _ = _pieces(0, "ddp", 1)
    for weights, traffic in run_on_ranks(world_size, _pieces, strategy, world_size):
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], atol=1e-10, rtol=0, msg=name)
        for predicted, sent in traffic:
            assert predicted == sent


def _fed(optimizer: Any, named: dict[str, Parameter], steps: range, without: dict[int, str] | None = None) -> None:
    """Steps of `_gradients`, from 1; at some, one parameter has none."""
    for step in steps:
        for name, parameter in named.items():
            missing = (without or {}).get(step) == name
            parameter.grad = None if missing else _gradients()[step - 1][name].to(parameter.dtype)
        optimizer.step()


def _parameters(dtype: torch.dtype = torch.float64) -> dict[str, Parameter]:
    return {name: Parameter(initial_weight(shape, i).to(dtype)) for i, (name, shape) in enumerate(MATRICES.items())}


def test_a_matrix_without_a_gradient_follows_its_role_to_a_new_dictionary() -> None:
    named, name = _parameters(), "layers.1.q.weight"
    optimizer = _shared(list(named.items()), error_feedback="fp32")
    _fed(optimizer, named, range(1, 4))
    first = optimizer.state[named["layers.0.q.weight"]]
    before = {key: value.clone() for key, value in optimizer.state[named[name]].items()}
    old, weight = first["dictionary"].T.clone(), named[name].detach().clone()
    _fed(optimizer, named, range(4, 5), without={4: name})
    after, new = optimizer.state[named[name]], first["dictionary"].T
    assert torch.equal(named[name], weight)
    assert not torch.allclose(old, new)
    # What waits is the same in space.
    torch.testing.assert_close(
        after["error_feedback"].double() @ new.T, before["error_feedback"].double() @ old.T, atol=1e-6, rtol=0
    )
    product = old[:, before["indices"].long()].T @ new  # (r, n)
    assert after["indices"].tolist() == sorted(product.square().sum(0).argsort(descending=True)[:3].tolist())
    rotation = product[:, after["indices"].long()]
    torch.testing.assert_close(after["exp_avg"], before["exp_avg"] @ rotation)
    torch.testing.assert_close(after["exp_avg_sq"], before["exp_avg_sq"] @ rotation**2)
    # And it goes on at its own pace; with the others it changes again.
    _fed(optimizer, named, range(5, 10))
    assert optimizer.state[named[name]]["step"] == 8


@pytest.mark.parametrize("options", [{}, {"refresh_stagger": True}, {"dtype": torch.float32}], ids=str)
def test_a_state_saved_within_an_interval_continues_to_the_bit(options: dict[str, Any]) -> None:
    dtype = options.get("dtype", torch.float64)
    options = {key: value for key, value in options.items() if key != "dtype"}
    named = _parameters(dtype)
    optimizer = _shared(list(named.items()), **options)
    _fed(optimizer, named, range(1, 7))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    copies = {name: Parameter(p.detach().clone()) for name, p in named.items()}
    resumed = _shared(list(copies.items()), **options)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    copied = copy.deepcopy((optimizer, named))
    for each, its_parameters in ((optimizer, named), (resumed, copies), copied):
        _fed(each, its_parameters, range(7, 14))
    for name in MATRICES:
        assert torch.equal(copies[name], named[name])
        assert torch.equal(copied[1][name], named[name])


def test_a_state_continues_where_another_matrix_kept_the_dictionary_because_the_first_was_frozen_then() -> None:
    named, first = _parameters(), "layers.0.q.weight"
    named[first].requires_grad_(False)
    optimizer = _shared(list(named.items()))
    _fed(optimizer, named, range(1, 6), without=dict.fromkeys(range(1, 3), first))  # then it has gradients
    copies = {name: Parameter(p.detach().clone()) for name, p in named.items()}
    resumed = _shared(list(copies.items()))
    resumed.load_state_dict(optimizer.state_dict())
    assert "dictionary" in resumed.state[copies[first]]
    assert "dictionary" not in optimizer.state[named[first]]
    for each, its_parameters in ((optimizer, named), (resumed, copies)):
        _fed(each, its_parameters, range(6, 14))
    for name in MATRICES:
        assert torch.equal(copies[name], named[name])


def test_roles_follow_from_names_or_the_group_says_them() -> None:
    assert role_of("model.layers.3.self_attn.q_proj.weight") == "model.layers.residual"
    assert role_of("model.layers.17.mlp.up_proj.weight") == "model.layers.residual"
    assert role_of("layers.0.attention.wk.weight") == role_of("layers.1.feed_forward.w3.weight") == "layers.residual"
    assert role_of("h.0.attn.c_attn.weight[1]") == role_of("h.7.mlp.c_fc.weight") == "h.residual"
    assert role_of("encoder.block.0.layer.0.SelfAttention.q.weight") == "encoder.block.residual"
    assert role_of("model.layers.3.self_attn.o_proj.weight") == "model.layers..self_attn.o_proj.weight"
    assert role_of("model.layers.3.mlp.down_proj.weight") == role_of("model.layers.4.mlp.down_proj.weight")
    assert role_of("layers.0.feed_forward.w2.weight") != role_of("layers.0.feed_forward.w1.weight")

    def dictionaries(**options: Any) -> dict[str, Tensor]:
        named = _parameters()
        optimizer = _shared([{"params": list(named.items()), **options}])
        return {
            name: optimizer.state[p]["dictionary"] for name, p in named.items() if "dictionary" in optimizer.state[p]
        }

    assert list(dictionaries()) == [role[0] for role in ROLES]
    assert list(dictionaries(role="all")) == ["layers.0.q.weight", "layers.0.down.weight"]  # another side
    with pytest.raises(ValueError, match="role: 3 is not allowed; allowed: None, or a name"):
        dictionaries(role=3)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            DCTAdamW,
            {"refresh_interval": 3, "dictionary_interval": 500},
            "dictionary_interval: 500 is not allowed; allowed: a multiple of refresh_interval=3",
        ),
        (Trion, {"dictionary_interval": 0}, "dictionary_interval: 0 is not allowed; allowed: an integer >= 1"),
        (DCTAdamW, {"transform": "fft"}, "transform: 'fft' is not allowed with dictionary='shared'"),
        (
            Trion,
            {"materialize": False, "transform": "auto"},
            "materialize: False is not allowed with dictionary='shared'",
        ),
        (DCTAdamW, {"column_bias_correction": True}, "column_bias_correction: True .*='shared', or transition='reset'"),
        (Fira, {"dictionary_interval": 500}, "dictionary_interval: 500 .* a multiple of refresh_interval=200"),
        (Fira, {"bias_correction": "choice"}, "bias_correction: 'choice' .* 'step' with subspace='shared'"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_with_the_reason(make: Any, options: dict[str, Any], message: str) -> None:
    own = {"subspace": "shared"} if make is Fira else {"dictionary": "shared"}
    with pytest.raises(ValueError, match=message):
        make([("layers.0.q.weight", Parameter(torch.zeros(8, 8)))], **own, **options)


def test_a_dictionary_counts_once_for_all_matrices_of_its_role() -> None:
    named = _parameters(torch.float32)
    optimizer = _shared(list(named.items()))
    held = optimizer.memory_bytes()
    assert held["shared_dictionary"] == 3 * 8 * 8 * 4
    assert held["dictionary"] == held["projection"] == 0
    assert held["indices"] == len(MATRICES) * 3


def _damaged(rank: int) -> str:
    named = _parameters()
    optimizer = _shared(list(named.items()), verify_every=2)
    _fed(optimizer, named, range(1, 2))
    if rank == 1:
        optimizer.state[named["layers.0.o.weight"]]["dictionary"][0, 0] += 1e-3
    with pytest.raises(RuntimeError) as caught:
        _fed(optimizer, named, range(2, 3))
    return str(caught.value)


def test_a_dictionary_that_is_not_the_same_on_all_ranks_stops_the_run() -> None:
    for message in run_on_ranks(2, _damaged):
        assert "on rank 1 are not those of rank 0" in message


def _of_the_budget(rank: int, strategy: str) -> list[tuple[str, int]]:
    model = Model({f"{index}.weight": shape for index, shape in enumerate(MATRICES.values())}, torch.float32)
    shard(model, strategy, 2, 3)
    named = list(zip(MATRICES, model.parameters(), strict=True))
    optimizer = _shared(named, agree_on_gradients=False, verify_every=0)
    for _ in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with CountCollectives() as counter:
            optimizer.step()
    return counter.calls


def test_a_change_sends_a_number_per_matrix_and_a_matrix_per_role_in_one_call_each() -> None:
    change = [("allreduce_", 8), ("allreduce_", 3 * 8 * 8)]
    scores = ("allreduce_", 8 * 8)
    for calls in run_on_ranks(2, _of_the_budget, "fsdp_rows"):
        # Of the matrices to the left, rows are fetched for the dictionaries, and again for the update.
        assert [name for name, _ in calls[:3]] == ["alltoall_base_", "allreduce_", "allreduce_"]
        assert [each for each in calls if each[0] == "allreduce_"] == [*change, scores]
    for calls in run_on_ranks(2, _of_the_budget, "ddp"):
        assert calls[:3] == [*change, scores]
        assert [name for name, _ in calls[3:]] == ["allgather_"]
