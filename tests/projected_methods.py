"""GaLore and its relatives: each optimizer with its options, and its reference's weights after every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from projected_references import (
    ReferenceApollo,
    ReferenceBlocks,
    ReferenceFira,
    ReferenceFrugal,
    ReferenceGrass,
    ReferenceLDAdam,
    ReferenceProjected,
    ReferenceSubTrack,
    signed,
)
from references import initial_weight, prescribed_gradients
from torch import Tensor

from dist_lowrank.dictionaries import DictionaryCache
from dist_lowrank.optim import Apollo, Fira, Frugal, GaLore, GoLore, Grass, LDAdam, SubTrack, published
from dist_lowrank.optim.projections import RandomProjection
from dist_lowrank.optim.rounding import RandomBits
from dist_lowrank.optim.subspace import Place
from dist_lowrank.sharding.layouts import tall_form

STEPS = 20
SHAPES = {"tall": (14, 6), "wide": (8, 12), "square": (9, 9)}  # no side divides by every number of ranks
SHARED = {"lr": 0.01, "rank": 3, "refresh_interval": 6, "weight_decay": 0.1}


def place_of(name: str, rank: int, step: int = 1) -> Place:
    form = tall_form(SHAPES[name], "shorter", rank)
    device = torch.device("cpu")
    return Place(form, torch.float64, device, False, DictionaryCache(), RandomBits(0, name, step), slice(None))


def _drawn(kind: str, rank: int) -> Callable[[str], Callable[[int], Tensor]]:
    """The package's own random bases, whose distribution is tested apart."""
    return lambda name: lambda number: RandomProjection(kind)._draw(place_of(name, rank), number)


def _golore(name: str) -> Callable[[int], Tensor]:
    return lambda number: signed(RandomProjection("orthonormal")._draw(place_of(name, 3), number))


# Optimizer and options; reference and options; basis of the reference by name of the matrix.
GALORE: dict[str, Any] = {**SHARED, "betas": (0.9, 0.999), "eps": 1e-6}
MINI: dict[str, Any] = {**GALORE, "rank": 1}
MOVED: dict[str, Any] = {**GALORE, "transition": "move"}
METHODS: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any], Any]] = {
    "galore": (GaLore, GALORE, ReferenceProjected, {**MOVED, "alpha": 0.25}, "svd"),
    "galore_published": (
        GaLore,
        {**published("galore"), **GALORE},
        ReferenceProjected,
        {**GALORE, "alpha": 0.25, "corrected_eps": False, "decay_last": True},
        "svd",
    ),
    "galore_staggered": (
        GaLore,
        {**GALORE, "refresh_stagger": True},
        ReferenceProjected,
        {**MOVED, "alpha": 0.25, "stagger": True},
        "svd",
    ),
    "galore_dct2": (
        GaLore,
        {**GALORE, "subspace": "dct2"},
        ReferenceProjected,
        {**MOVED, "alpha": 0.25},
        "dct2",
    ),
    "fira": (Fira, GALORE, ReferenceFira, {**MOVED, "alpha": 0.25, "corrected_eps": False, "inside": 0.0}, "svd"),
    "fira_published": (
        Fira,
        {**published("fira"), **GALORE},
        ReferenceFira,
        {**GALORE, "alpha": 0.25, "corrected_eps": False, "inside": 0.75, "decay_last": True},
        "svd",
    ),
    "fira_hadamard": (
        Fira,
        {**GALORE, "subspace": "dct3"},
        ReferenceFira,
        {**MOVED, "alpha": 0.25, "corrected_eps": False, "inside": 0.0},
        "dct3",
    ),
    "frugal": (
        Frugal,
        {**GALORE, "residual_scale": 0.3},
        ReferenceFrugal,
        {**GALORE, "transition": "reset", "kappa": 0.3},
        _drawn("coordinates", 3),
    ),
    "frugal_svd": (
        Frugal,
        {**GALORE, "subspace": "svd"},
        ReferenceFrugal,
        {**GALORE, "transition": "reset", "kappa": 1.0},
        "svd",
    ),
    "frugal_stiefel": (
        Frugal,
        {**GALORE, "subspace": "stiefel"},
        ReferenceFrugal,
        {**GALORE, "transition": "reset", "kappa": 1.0},
        _drawn("orthonormal", 3),
    ),
    "frugal_blocks": (
        Frugal,
        {**GALORE, "rank": 2, "subspace": "blocks", "block_order": "ascending", "residual_scale": 0.3},
        ReferenceBlocks,
        {**GALORE, "kappa": 0.3},
        "blocks",
    ),
    "apollo": (
        Apollo,
        GALORE,
        ReferenceApollo,
        {**GALORE, "corrected_eps": False, "per": "channel", "scale": 1.0},
        _drawn("gaussian", 3),
    ),
    "apollo_mini": (
        Apollo,
        {**MINI, "per": "tensor", "scale": 128.0},
        ReferenceApollo,
        {**MINI, "corrected_eps": False, "per": "tensor", "scale": 128.0},
        _drawn("gaussian", 1),
    ),
    "golore": (GoLore, {**GALORE, "switch_step": 10}, ReferenceProjected, {**MOVED, "alpha": 0.25}, None),
    "ldadam": (
        LDAdam,
        {"lr": 0.01, "rank": 3, "weight_decay": 0.1},
        ReferenceLDAdam,
        {**SHARED, "betas": (0.908, 0.99), "eps": 1e-8, "rho": 0.908, "square_left": True, "feedback": True},
        "svd",
    ),
    "ldadam_without_feedback": (
        LDAdam,
        {"lr": 0.01, "rank": 3, "error_feedback": False},
        ReferenceLDAdam,
        {
            **(SHARED | {"weight_decay": 0.0}),
            "betas": (0.908, 0.99),
            "eps": 1e-8,
            "rho": 0.908,
            "square_left": True,
            "feedback": False,
        },
        "svd",
    ),
    "subtrack": (
        SubTrack,
        {**GALORE, "grassmann_step": 0.01},  # angles of about 0.3
        ReferenceSubTrack,
        {**GALORE, "alpha": 0.25, "corrected_eps": False, "inside": 0.0, "eta": 0.01},
        "svd",
    ),
    "subtrack_published": (
        SubTrack,
        {**published("subtrack"), **GALORE},
        ReferenceSubTrack,
        {**GALORE, "alpha": 0.25, "corrected_eps": False, "inside": 0.75, "eta": 10.0, "decay_last": True},
        "svd",
    ),
    "grass_published": (
        Grass,
        {**published("grass"), **GALORE},
        ReferenceGrass,
        {**GALORE, "alpha": 0.25, "transition": "reset"},
        "identity",
    ),
    "grass": (Grass, GALORE, ReferenceGrass, {**GALORE, "alpha": 0.25, "transition": "move"}, "identity"),
}


class GoLoreReference(ReferenceProjected):
    """SVD before the switch, random from it on."""

    def choose(self, tall: Tensor) -> Tensor:
        if self.t < 10:
            return super().choose(tall)
        return self.random((self.t - 1) // self.T)


@cache
def expected(method: str) -> dict[str, list[Tensor]]:
    """By name: the weight after every step."""
    _, _, make, options, basis = METHODS[method]
    trajectories = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        if method == "golore":
            reference = GoLoreReference(initial_weight(shape), **options, random=_golore(name))
        else:
            chosen = basis if isinstance(basis, str) else basis(name)
            # Of (square, tall, wide) two at a time, going round.
            turns = [sorted(SHAPES).index(name) in pair for pair in ((0, 1), (2, 0), (1, 2), (0, 1))]
            offset = sorted(SHAPES).index(name) if options.get("stagger") else 0  # ParameterDict sorts
            reference = make(initial_weight(shape), **options, basis=chosen, offset=offset, turns=turns)
        weights = []
        for gradient in prescribed_gradients(shape, STEPS, seed=index):
            reference.step(gradient)
            weights.append(reference.weight.clone())
        trajectories[name] = weights
    return trajectories
