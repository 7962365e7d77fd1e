"""Weights and optimizer state of the published models in their published settings, without making them.

The figures are of the C4 benchmark's models in bf16, in GB of 1e9 bytes; the ranks are those of the papers. Nothing is
allocated: models are built on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch

from dist_lowrank.config import RunConfig, compose
from dist_lowrank.config.compose import config_directory, group_options
from dist_lowrank.config.schema import ModelConfig
from dist_lowrank.training.model import build_model, route
from dist_lowrank.training.optimizers import make_optimizer
from dist_lowrank.training.parameter_table import parameter_table

PRESETS = group_options(config_directory())["optimizer"]
SIZES = ("60m", "130m", "350m", "1b", "7b")
RANKS = dict(zip(SIZES, (128, 256, 256, 512, 1024), strict=True))
RANKED = ("galore", "galore2", "golore", "fira", "ldadam", "apollo", "subtrack", "grass")
# torch's AdamW keeps its moments as weights by itself; of the others each says how.
OWN_STATE_DTYPES = ("adamw", "scale", "adafactor", "came", "smmf", "adamw8bit")
# By optimizer: what has to be said beside bf16 weights and the rank, and the figures by size.
GALORE = (0.280, 0.611, 1.389, 4.763, 22.88)
TABLE: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "adamw": ((), (0.348, 0.805, 2.208, 8.034, 40.43)),
    "galore": ((), GALORE),
    "galore2": ((), GALORE),
    "golore": ((), GALORE),
    "fira": ((), GALORE),
    "ldadam": (("optimizer/residual=none",), GALORE),  # the published figure is without the error, which is a gradient
    "apollo": ((), (0.273, 0.578, 1.301, 4.411, 21.00)),
    "apollo_mini": ((), (0.247, 0.465, 0.999, 3.205, 14.53)),
    "frugal": ((), (0.273, 0.550, 1.301, 4.411)),
    "scale": (("optimizer.moment_dtype=bf16",), (0.149, 0.317, 0.802, 2.810, 13.74)),
    "adafactor": ((), (0.117, 0.269, 0.738, 2.683)),
    "came": ((), (0.350, 0.807, 2.212, 8.043, 40.45)),
    "smmf": ((), (0.124, 0.286, 0.786, 2.853, 14.34)),
    "adamw8bit": ((), (0.234, 0.541, 1.483, 5.398, 27.16)),
    "muon": ((), (0.298, 0.635, 1.603, 5.619)),  # with Adam for embeddings and head
    "dion": (("optimizer.rank=0.25",), (0.305, 0.660, 1.691, 5.971, 29.36)),
    # Of these there is no published figure, only the forecast below.
    "dion3": ((), ()),
    "subtrack": ((), ()),
    "grass": ((), ()),
}


def overrides_of(optimizer: str, size: str) -> list[str]:
    columns = optimizer == "frugal"  # the figures are of FRUGAL's columns; its published code has whole matrices
    preset = f"{optimizer}_published" if f"{optimizer}_published" in PRESETS and not columns else optimizer
    settings = [f"optimizer={preset}", *TABLE[optimizer][0]]
    settings += [f"optimizer.rank={RANKS[size]}"] if optimizer in RANKED else []
    settings += [] if optimizer in OWN_STATE_DTYPES else ["optimizer.state_dtype=weights"]
    return [*settings, f"model=llama_{size}", "precision=bf16_weights", "strategy=ddp"]


@cache
def configuration(optimizer: str, size: str) -> RunConfig:
    """As `overrides_of` say; composed once for each optimizer and each model, because that takes the longest here."""
    if size == SIZES[0]:
        return compose(overrides_of(optimizer, size))
    first = configuration(optimizer, SIZES[0])
    of_size = {"rank": RANKS[size]} if optimizer in RANKED else {}
    return replace(first, model=_model(size), optimizer=replace(first.optimizer, **of_size))


@cache
def _model(size: str) -> ModelConfig:
    return compose([f"model=llama_{size}"]).model


def cases() -> Iterator[tuple[str, str, float]]:
    for optimizer, (_, figures) in TABLE.items():
        for size, gigabytes in zip(SIZES, figures, strict=False):
            yield optimizer, size, gigabytes


@pytest.mark.parametrize(("optimizer", "size", "gigabytes"), cases())
def test_weights_and_state_are_as_published(optimizer: str, size: str, gigabytes: float) -> None:
    config = configuration(optimizer, size)
    model = build_model(config, meta=True)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    state = sum(row.state_bytes for row in parameter_table(config, 1))
    assert (weights + state) / 1e9 == pytest.approx(gigabytes, rel=0.01)


SMALL = ["model.config.hidden_size=24", "model.config.intermediate_size=40", "model.config.num_attention_heads=3"]


@pytest.mark.parametrize("optimizer", TABLE)
def test_the_forecast_is_what_an_optimizer_allocates(optimizer: str) -> None:
    """On a model of the same parts that is small enough to make; so the figures above are not only arithmetic."""
    rank = ["optimizer.rank=5"] if optimizer in RANKED else []
    config = compose([*overrides_of(optimizer, "60m"), *SMALL, *rank, "data.vocab_size=300"])
    model = build_model(config)
    updater = make_optimizer(config, route(model, config))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    updater.step()
    allocated = sum(tensor.nbytes for state in updater.state.values() for tensor in state.values())
    assert allocated == sum(row.state_bytes for row in parameter_table(config, 1))
