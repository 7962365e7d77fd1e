"""The published settings: what the functions give, that the command line gives the same, and that they run."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from trajectories import KINDS, SHAPES, assert_equals_references, both, make, make_parameters, references_of

from dist_lowrank.config import compose
from dist_lowrank.optim import published

# What differs from our defaults, from the published constructors and algorithms.
DIFFERENCES: dict[str, dict[str, Any]] = {
    "dct_adamw": {"betas": (0.9, 0.999), "dictionary": "dct3", "ranking": "l1", "transition": "keep"},
    "trion": {"dictionary": "dct3", "ranking": "l1", "dense_eps": 1e-10},
}


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


def test_an_optimizer_without_published_settings_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adamw8bit.*dct_adamw, trion"):
        published("adamw8bit")
