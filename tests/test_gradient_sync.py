"""Summing coefficients instead of gradients under DistributedDataParallel changes no trajectory, only what is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from collectives import CountCollectives
from processes import run_on_ranks
from references import dense_dictionary
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_lowrank.optim import (
    Apollo,
    DCTAdamW,
    Fira,
    GaLore,
    GoLore,
    Grass,
    Muon,
    ProjectedAdam,
    sum_coefficients,
)

STEPS, INTERVAL = 11, 4
FULL_STEPS = {1, 4, 8}  # at which directions are chosen
SAMPLES = 8  # of the global batch

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "galore": (GaLore, {"rank": 0.25, "refresh_interval": INTERVAL}),
    "golore": (GoLore, {"rank": 3, "refresh_interval": INTERVAL, "switch_step": 4}),
    "grass": (Grass, {"rank": 0.25, "refresh_interval": INTERVAL}),
    "dct_adamw": (DCTAdamW, {"rank": 0.25, "refresh_interval": INTERVAL}),
    "dct_adamw_staggered": (DCTAdamW, {"rank": 0.25, "refresh_interval": INTERVAL, "refresh_stagger": True}),
    "dct_adamw_previous": (DCTAdamW, {"rank": 0.25, "selection": "previous"}),
    "power": (ProjectedAdam, {"rank": 0.25, "refresh_interval": INTERVAL, "subspace": "power"}),
}


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 9), nn.Linear(9, 9, bias=False)]
    return nn.Sequential(*layers).double()


def _train(rank: int, world_size: int, name: str, low_rank: bool, accumulate: int = 1) -> Any:
    """Weights after each step, and by step the numbers of elements that the backward pass sent."""
    kind, options = OPTIMIZERS[name]
    model = _model()
    optimizer = kind(model.named_parameters(), lr=0.01, **options)
    trained: Any = DistributedDataParallel(model, bucket_cap_mb=0.001) if world_size > 1 else model
    if low_rank:
        sum_coefficients(trained, optimizer)
    generator = torch.Generator().manual_seed(5)
    weights, sent = [], []
    for _ in range(STEPS):
        data = torch.randn(SAMPLES, 12, generator=generator, dtype=torch.float64)
        own = data.chunk(world_size)[rank]
        with CountCollectives() as counted:
            for index, part in enumerate(own.chunk(accumulate)):
                last = index == accumulate - 1
                if world_size > 1 and not last:
                    with trained.no_sync():
                        (trained(part).sin().sum() * world_size / SAMPLES).backward()
                else:
                    (trained(part).sin().sum() * world_size / SAMPLES).backward()
        optimizer.step()
        optimizer.zero_grad()
        sent.append(sum(elements for call, elements in counted.calls if call == "allreduce_"))
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    return weights, sent


def _both(rank: int, world_size: int, names: list[str], accumulate: int = 1) -> Any:
    return {
        name: [_train(rank, world_size, name, low_rank, accumulate) for low_rank in (True, False)] for name in names
    }


def _largest_difference(left: list[list[Tensor]], right: list[list[Tensor]]) -> float:
    pairs = [pair for step in zip(left, right, strict=True) for pair in zip(*step, strict=True)]
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_trajectory_is_that_of_whole_gradients_and_of_one_process(world_size: int) -> None:
    names = (
        [name for name in OPTIMIZERS if name != "dct_adamw_previous"] if world_size == 2 else ["galore", "dct_adamw"]
    )
    alone = {name: _train(0, 1, name, low_rank=False)[0] for name in names}
    for results in run_on_ranks(world_size, _both, world_size, names):
        for name, (low_rank, whole) in results.items():
            assert _largest_difference(low_rank[0], whole[0]) < 1e-10, name
            assert _largest_difference(low_rank[0], alone[name]) < 1e-10, name


def _reference_of_previous_selection(world_size: int) -> list[list[Tensor]]:
    """DCT-AdamW on `_model`, columns by the scores of the ranks' own gradients at the step before; weights by step."""
    model, generator = _model(), torch.Generator().manual_seed(5)
    parameters = list(model.parameters())
    state: dict[int, dict[str, Any]] = {}
    weights = []
    for step in range(1, STEPS + 1):
        data = torch.randn(SAMPLES, 12, generator=generator, dtype=torch.float64)
        by_rank = [
            torch.autograd.grad(model(own).sin().sum() * world_size / SAMPLES, parameters)
            for own in data.chunk(world_size)
        ]
        for index, parameter in enumerate(parameters):
            own_gradients = [gradients[index] for gradients in by_rank]
            mean = torch.stack(own_gradients).mean(dim=0)
            known = state.setdefault(index, {})
            if parameter.ndim == 1:
                direction = _adam(known, mean, step)
            else:
                wide = parameter.shape[0] < parameter.shape[1]
                tall = [gradient.T if wide else gradient for gradient in own_gradients]
                dictionary = dense_dictionary("dct2", tall[0].shape[1])
                rank = round(0.25 * len(dictionary))
                # At the first step the whole mean gradient is known.
                local = sum((each @ dictionary).square().sum(dim=0) for each in tall)
                current = ((mean.T if wide else mean) @ dictionary).square().sum(dim=0) if step == 1 else local
                scores = current if step == 1 else known["scores"]
                chosen = sorted(torch.argsort(scores, descending=True, stable=True)[:rank].tolist())
                known["scores"] = current
                basis = dictionary[:, chosen]
                for key in ("m", "v"):
                    columns = dict(zip(known.get("chosen", []), known.get(key, mean.new_zeros(1, 0)).T, strict=True))
                    known[key] = torch.stack([columns.get(k, mean.new_zeros(len(tall[0]))) for k in chosen], dim=1)
                known["chosen"] = chosen
                lifted = _adam(known, (mean.T if wide else mean) @ basis, step) @ basis.T
                direction = lifted.T if wide else lifted
            parameter.data -= 0.01 * direction
        weights.append([parameter.detach().clone() for parameter in parameters])
    return weights


def _adam(state: dict[str, Any], gradient: Tensor, step: int) -> Tensor:
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * gradient
    state["v"] = 0.99 * state.get("v", 0) + 0.01 * gradient**2
    mean, square = state["m"] / (1 - 0.9**step), state["v"] / (1 - 0.99**step)
    result: Tensor = mean / (square.sqrt() + 1e-8)
    return result


def test_columns_of_the_step_before_are_chosen_as_the_formula_says() -> None:
    alone = _train(0, 1, "dct_adamw_previous", low_rank=False)[0]
    assert _largest_difference(alone, _reference_of_previous_selection(1)) < 1e-10
    reference = _reference_of_previous_selection(2)
    assert _largest_difference(alone, reference) > 1e-3, "the number of ranks should show"
    for results in run_on_ranks(2, _both, 2, ["dct_adamw_previous"]):
        (low_rank, sent), (whole, _) = results["dct_adamw_previous"]
        assert _largest_difference(low_rank, reference) < 1e-10
        assert _largest_difference(whole, alone) < 1e-10
        assert sent[1:] == [69 + 60 + 40 + 18 + 12 + 9 + 9] * (STEPS - 1)  # vectors, coefficients, scores


def test_micro_batches_are_accumulated_before_they_are_projected() -> None:
    alone = _train(0, 1, "dct_adamw", low_rank=False)[0]
    for results in run_on_ranks(2, _both, 2, ["dct_adamw"], 2):
        assert _largest_difference(results["dct_adamw"][0][0], alone) < 1e-10


def test_between_refreshes_a_matrix_sends_its_coefficients_alone() -> None:
    (_, low_rank), (_, plain) = run_on_ranks(2, _both, 2, ["dct_adamw"])[0]["dct_adamw"]
    whole = sum(parameter.numel() for parameter in _model().parameters())
    vectors = sum(parameter.numel() for parameter in _model().parameters() if parameter.ndim == 1)
    coefficients = 20 * 3 + 20 * 2 + 9 * 2  # (20, 12) right, (9, 20) left, (9, 9) right; a quarter of 12, 9 and 9
    assert plain == [whole] * STEPS
    for step, sent in enumerate(low_rank, start=1):
        assert sent == (whole if step in FULL_STEPS else vectors + coefficients), step


def _one_step_with_an_infinite_gradient(rank: int) -> bool:
    model = _model()
    optimizer = GaLore(model.named_parameters(), rank=0.25, refresh_interval=INTERVAL)
    trained = DistributedDataParallel(model)
    sum_coefficients(trained, optimizer)
    for bad in (False, True):
        optimizer.zero_grad()
        data = torch.ones(2, 12, dtype=torch.float64)
        data[0, 0] = torch.inf if bad and rank == 1 else 1.0
        trained(data).sum().backward()
        if not bad:
            optimizer.step()
    weight = model[0].weight.grad
    assert weight is not None
    return bool(torch.isfinite(weight).all())


def test_what_is_not_finite_on_one_rank_is_seen_by_all() -> None:
    assert run_on_ranks(2, _one_step_with_an_infinite_gradient) == [False, False]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Muon, {}, "recipe of whole matrices"),
        (Fira, {}, "False with a residual"),
        (Apollo, {}, "False with a residual"),
        (DCTAdamW, {"refresh_interval": 4, "error_feedback": "fp32"}, "False with a residual or error feedback"),
        (GaLore, {"subspace": "gaussian"}, "not orthonormal"),
        (DCTAdamW, {}, "refresh_interval=1"),
        (DCTAdamW, {"refresh_interval": 4, "dictionary": "shared", "dictionary_interval": 8}, "shared dictionary"),
    ],
)
def test_optimizers_that_need_the_whole_gradient_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    def refused(rank: int) -> str:
        model = _model()
        with pytest.raises(ValueError, match=message):
            sum_coefficients(DistributedDataParallel(model), kind(model.named_parameters(), **options))
        return "refused"

    assert run_on_ranks(1, refused) == ["refused"]
