"""Dictionaries that all matrices of a role learn together: as a reference says, under every sharding, and resumed."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from collectives import CountCollectives
from processes import run_on_ranks
from references import ReferenceDCTAdamW, ReferenceTrion, initial_weight, prescribed_gradients
from sharded_models import Model, shard
from shared_references import SharedFira, SharedFrugal, SharedGaLore, SharedReference
from torch import Tensor
from torch.nn import Parameter

from dist_lowrank.optim import DCTAdamW, Fira, Frugal, GaLore, Trion
from dist_lowrank.optim.roles import role_of

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


def _shared(named: Any, **options: Any) -> DCTAdamW:
    defaults = {"lr": 0.01, "rank": 3, "dictionary": "shared", "dictionary_interval": 4, "refresh_interval": 2}
    return DCTAdamW(named, **defaults | options)


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
