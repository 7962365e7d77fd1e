"""The C4 protocol of the published low-rank benchmarks composes for every method, size and precision, and is whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dist_lowrank.config import ConfigError, RunConfig, compose, to_dict
from dist_lowrank.config.compose import config_directory, group_options
from dist_lowrank.config.schema import HubData
from dist_lowrank.launchers.preparation import check_world
from dist_lowrank.training.data.tokenizer import train_tokenizer
from dist_lowrank.training.parameter_table import parameter_table

SIZES = ("60m", "130m", "350m", "1b", "7b")
PRECISIONS = ("bf16_weights", "bf16")
OPTIONS = group_options(config_directory())
EXPERIMENTS = [name for name in OPTIONS["experiment"] if name.startswith("c4_")]
RANKS = 8  # processes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """In place of the hub's t5-base."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a few words"], 300).save_pretrained(folder)
    return f"data.tokenizer={folder}"


def cases() -> Iterator[Any]:
    """Each method in one size and precision; the others are slow."""
    for number, experiment in enumerate(EXPERIMENTS):
        for position, (size, precision) in enumerate((s, p) for s in SIZES for p in PRECISIONS):
            quick = position == (3 * number) % (len(SIZES) * len(PRECISIONS))
            yield pytest.param(experiment, size, precision, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("experiment", "size", "precision"), cases())
def test_every_experiment_is_complete_in_every_size_and_precision(
    experiment: str, size: str, precision: str, tokenizer: str
) -> None:
    config = compose([f"experiment={experiment}", f"model=llama_{size}", f"precision={precision}", tokenizer])
    assert (config.model.name, config.precision.name) == (f"llama_{size}", precision)
    assert isinstance(config.data, HubData)
    assert (config.data.packing, config.data.sequence_length) == (False, 256)
    check_world(config, RANKS)
    rows = parameter_table(config, RANKS)
    rank = getattr(config.optimizer, "rank", None)
    if rank is not None:
        matrices = [row for row in rows if row.path == "low-rank"]
        assert len(matrices) == 7 * config.model.config["num_hidden_layers"]
        assert all(row.rank == rank or isinstance(rank, float) for row in matrices)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIONS["optimizer"])
def test_the_protocol_takes_any_optimizer(optimizer: str, tokenizer: str) -> None:
    config = compose(["experiment=c4", f"optimizer={optimizer}", tokenizer])
    assert parameter_table(config, RANKS)


# What the authors' scripts say of a size, as the schema's keys.
PUBLISHED: dict[tuple[str, str], dict[str, Any]] = {
    ("c4_galore", "60m"): {
        "optimizer": {"lr": 0.01, "alpha": 0.25, "rank": 128, "refresh_interval": 200, "decay_last": True}
    },
    ("c4_galore", "7b"): {
        "optimizer": {"lr": 0.005, "rank": 1024, "refresh_interval": 500},
        "train": {"clip_norm": 1.0, "steps": 150_000, "global_batch_size": 512},
    },
    ("c4_fira", "1b"): {"optimizer": {"lr": 0.01, "alpha": 0.0625, "rank": 512, "residual_inside": 0.9375}},
    ("c4_fira", "7b"): {"optimizer": {"lr": 0.005, "rank": 64, "refresh_interval": 500}, "train": {"steps": 10_000}},
    ("c4_apollo", "130m"): {"optimizer": {"lr": 0.01, "rank": 192, "residual_scale": 1.0}, "train": {"steps": 20_000}},
    ("c4_apollo_mini", "130m"): {"optimizer": {"lr": 0.01, "rank": 1, "residual_scale": 192.0}},
    ("c4_frugal", "350m"): {"optimizer": {"lr": 1e-3, "rank": 0.25}, "train": {"steps": 300_000, "clip_norm": None}},
    ("c4_ldadam", "350m"): {
        "optimizer": {"lr": 1e-3, "betas": (0.908, 0.99), "rho": 0.908, "rank": 8, "residual": "error_feedback"},
        "train": {"steps": 55_000},
    },
    ("c4_golore", "60m"): {"optimizer": {"lr": 1e-3, "rank": 128, "refresh_interval": 200}},
    ("c4_scale", "60m"): {"optimizer": {"lr": 1e-3, "momentum": 0.9}, "train": {"steps": 11_000}},
    ("c4_scale", "1b"): {"optimizer": {"lr": 2e-4, "dense_lr": 1e-3}},
    ("c4_subtrack", "350m"): {
        "optimizer": {"lr": 1e-3, "rank": 256, "alpha": 0.25, "grassmann_step": 10.0},
        "train": {"steps": 10_000, "global_batch_size": 128},
    },
}


@pytest.mark.parametrize(("experiment", "size"), PUBLISHED)
def test_settings_are_those_of_the_published_scripts(experiment: str, size: str) -> None:
    config = compose([f"experiment={experiment}", f"model=llama_{size}"])
    for section, expected in PUBLISHED[experiment, size].items():
        found = {key: getattr(getattr(config, section), key) for key in expected}
        assert found == expected


def _state_bytes(config: RunConfig) -> int:
    return sum(row.state_bytes for row in parameter_table(config, 1))


def test_state_follows_the_precision(tokenizer: str) -> None:
    """Pure bf16 as published, or all in fp32: twice the bytes, but for counters and norms."""
    narrow, wide = (_state_bytes(compose(["experiment=c4_fira", f"precision={p}", tokenizer])) for p in PRECISIONS)
    assert wide == pytest.approx(2 * narrow, rel=1e-4)


def test_both_evaluators_are_a_key_away() -> None:
    assert not compose(["experiment=c4_galore"]).train.eval_legacy_counter
    assert compose(["experiment=c4_galore", "train.eval_legacy_counter=true"]).train.eval_legacy_counter


def test_the_parts_of_a_published_method_can_be_exchanged(tokenizer: str) -> None:
    config = compose(["experiment=c4_fira", "optimizer/subspace=dct2", "optimizer.rank=64", "train.steps=7", tokenizer])
    assert (config.optimizer.subspace, config.optimizer.rank, config.train.steps) == ("dct2", 64, 7)  # type: ignore


def test_a_model_that_the_protocol_does_not_know_is_refused_and_its_table_is_not_part_of_a_run() -> None:
    with pytest.raises(ConfigError, match=r"_by_model\.llama_3b.* not found"):
        compose(["experiment=c4_galore", "model=llama_3b"])
    assert not [key for key in to_dict(compose(["experiment=c4_galore"])) if key.startswith("_")]
