"""The published settings: what the functions give, that the command line gives the same, and that they run."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from trajectories import (
    KINDS,
    SHAPES,
    WHOLE_KINDS,
    assert_equals_references,
    both,
    make,
    make_parameters,
    references_of,
    train,
)

from dist_lowrank.config import compose
from dist_lowrank.optim import Apollo, Fira, Frugal, GaLore, GoLore, Grass, SubTrack, published

# What differs from our defaults, from the published constructors and algorithms.
DIFFERENCES: dict[str, dict[str, Any]] = {
    "dct_adamw": {"betas": (0.9, 0.999), "dictionary": "dct3", "ranking": "l1", "transition": "keep"},
    "trion": {"dictionary": "dct3", "ranking": "l1", "dense_eps": 1e-10},
}

# Of GaLore and its relatives: what Python calls them, what they need beside published settings, and what these change.
FAMILY: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "galore": (GaLore, {}, {"transition": "keep", "corrected_eps": False, "decay_last": True}),
    "golore": (GoLore, {"switch_step": 9}, {"transition": "keep", "corrected_eps": False, "decay_last": True}),
    "fira": (Fira, {}, {"transition": "keep", "residual_inside": 0.75, "decay_last": True}),
    "apollo": (Apollo, {}, {"decay_last": True}),
    "apollo_mini": (Apollo, {"rank": 1, "per": "tensor", "scale": 128.0}, {"decay_last": True}),
    "subtrack": (SubTrack, {}, {"residual_inside": 0.75, "decay_last": True}),
    "frugal": (Frugal, {}, {"subspace": "blocks"}),
    "grass": (Grass, {}, {"transition": "reset"}),
}


@pytest.mark.parametrize("kind", FAMILY)
def test_published_settings_of_the_family_differ_from_the_defaults_in_what_the_text_lists(kind: str) -> None:
    make_one, needed, differences = FAMILY[kind]
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    defaults, followed = (make_one([parameter], **options).defaults for options in (needed, needed | published(kind)))
    assert {key: followed[key] for key in followed if followed[key] != defaults[key]} == differences


@pytest.mark.parametrize("kind", FAMILY)
def test_the_command_line_gives_the_published_settings_of_the_family(kind: str) -> None:
    config = compose([f"optimizer={kind}_published", "model=llama_60m", "optimizer/moments=adam_int8"]).optimizer
    assert (config.name, config.moment_dtype) == (kind, "int8")  # its parts can be replaced as those of the others
    assert {key: getattr(config, key) for key in published(kind)} == published(kind)


@both
def test_published_differs_from_the_defaults_in_what_its_text_lists(kind: str) -> None:
    defaults = {k: p.default for k, p in inspect.signature(KINDS[kind][0].__init__).parameters.items()}
    options = published(kind)
    assert {key: value for key, value in options.items() if value != defaults[key]} == DIFFERENCES[kind]


@both
def test_published_settings_follow_the_formulas_and_give_way_to_explicit_options(kind: str) -> None:
    parameters = make_parameters(SHAPES)
    options = published(kind)
    optimizer = make(kind, parameters, **options)
    of_formula = {key: value for key, value in options.items() if not key.startswith("dense_")}
    assert_equals_references(optimizer, parameters, references_of(kind, parameters, **of_formula))

    assert make(kind, parameters, **{**published(kind), "ranking": "l2"}).param_groups[0]["ranking"] == "l2"
    assert published(kind)["ranking"] == "l1", "the table itself must not change"


@both
def test_the_command_line_gives_the_same_published_settings(kind: str) -> None:
    config = compose([f"optimizer={kind}_published", "model=llama_60m"]).optimizer
    assert config.name == kind
    assert {key: getattr(config, key) for key in published(kind)} == published(kind)


OF_WHOLE: dict[str, dict[str, Any]] = {
    "muon": {"newton_schulz_dtype": torch.bfloat16, "state_dtype": "weights", "dense_eps": 1e-10},
    "dion": {"rank": 1.0, "state_dtype": "weights"},
    "dion3": {"newton_schulz_dtype": torch.bfloat16, "state_dtype": "weights"},
}


@pytest.mark.parametrize("kind", WHOLE_KINDS)
def test_published_settings_of_whole_matrices_differ_from_the_defaults_in_what_is_listed_and_run(kind: str) -> None:
    make_whole = WHOLE_KINDS[kind][0]
    defaults = {k: p.default for k, p in inspect.signature(make_whole.__init__).parameters.items()}
    assert {key: value for key, value in published(kind).items() if value != defaults[key]} == OF_WHOLE[kind]
    config = compose([f"optimizer={kind}_published", "model=llama_60m"]).optimizer
    assert config.name == kind
    for key, value in published(kind).items():
        assert getattr(config, key) == ("bf16" if value is torch.bfloat16 else value), key
    parameters = make_parameters(SHAPES, torch.bfloat16)
    train(make_whole(parameters, **published(kind)), parameters, steps=2)
    assert all(p.isfinite().all() for p in parameters)


def test_an_optimizer_without_published_settings_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adamw8bit.*dct_adamw, trion, galore"):
        published("adamw8bit")
