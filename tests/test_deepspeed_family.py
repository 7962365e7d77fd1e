"""GaLore's family, Muon and Dion under DeepSpeed's ZeRO: each follows its trajectory on one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import deepspeed_runs
import pytest
import torch
from deepspeed_runs import Model, configuration, feed, gradients_of, start_bound, weights_of
from processes import run_on_ranks
from support_matrix import supports
from torch import Tensor

from dist_lowrank.optim import (
    Apollo,
    Dion,
    Dion3,
    Fira,
    Frugal,
    GaLore,
    GoLore,
    Grass,
    LDAdam,
    Muon,
    SubTrack,
    param_groups,
)

STEPS = 20
SHARED: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "rank": 2, "refresh_interval": 6}
FAMILY: dict[str, tuple[Any, dict[str, Any]]] = {
    "galore": (GaLore, SHARED),
    "galore_dct2": (GaLore, {**SHARED, "subspace": "dct2", "transition": "move"}),
    "galore_randomized": (GaLore, {**SHARED, "subspace": "randomized_svd"}),
    "golore": (GoLore, {**SHARED, "switch_step": 10}),
    "fira": (Fira, SHARED),
    "frugal": (Frugal, {**SHARED, "residual_scale": 0.3}),
    "apollo": (Apollo, SHARED),
    "apollo_mini": (Apollo, {**SHARED, "rank": 1, "per": "tensor", "scale": 4.0}),
    "ldadam": (LDAdam, {"lr": 0.02, "weight_decay": 0.1, "rank": 2}),
    "subtrack": (SubTrack, {**SHARED, "grassmann_step": 0.01}),
    "grass": (Grass, SHARED),
    "muon": (Muon, {"lr": 0.02, "weight_decay": 0.1}),
    "dion": (Dion, {"lr": 0.02, "weight_decay": 0.1, "rank": 2}),
    "dion3": (Dion3, {"lr": 0.02, "weight_decay": 0.1, "rank": 2}),
}
deepspeed_runs.KINDS |= FAMILY


@cache
def one_process(kind: str) -> dict[str, Tensor]:
    """Where the optimizer takes the model without DeepSpeed, which other tests compare with the references."""
    model = Model()
    make, options = FAMILY[kind]
    optimizer = make(param_groups(model), **options)
    for gradients in gradients_of(STEPS):
        for module, gradient in zip(model.weights.values(), gradients, strict=True):
            module.weight.grad = gradient.clone()
        optimizer.step()
    return {name: module.weight.detach() for name, module in model.weights.items()}


def _trajectories(rank: int, config: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for kind in kinds:
        engine = start_bound(config, kind)
        for gradients in gradients_of(STEPS):
            feed(engine, gradients)
        found[kind] = weights_of(engine)
    return found


def assert_follow(world_size: int, stage: int, kinds: tuple[str, ...]) -> None:
    for found in run_on_ranks(world_size, _trajectories, configuration(stage), kinds):
        for kind, weights in found.items():
            for name, weight in weights.items():
                torch.testing.assert_close(weight, one_process(kind)[name], atol=1e-5, rtol=0, msg=f"{kind}: {name}")


@pytest.mark.parametrize(("stage", "kinds"), [(2, ("fira", "subtrack")), (3, ("muon", "ldadam"))])
def test_two_of_the_family_follow_the_one_process_trajectory(stage: int, kinds: tuple[str, ...]) -> None:
    """The quick part of the next."""
    assert_follow(2, stage, kinds)


@pytest.mark.slow
@supports("exact")
@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("strategy", ["zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_zero_follows_the_one_process_trajectory(world_size: int, strategy: str, kind: str) -> None:
    assert_follow(world_size, int(strategy[-1]), (kind,))
