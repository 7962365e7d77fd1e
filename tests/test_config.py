"""The configuration: what composes, what the presets are, and what the digest covers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dist_lowrank.config import compose, digest, from_dict, to_dict
from dist_lowrank.config.compose import config_directory, group_options
from dist_lowrank.config.optimizers import (
    AdamWConfig,
    DCTAdamWConfig,
    Dion3Config,
    DionConfig,
    MuonConfig,
    ProjectedConfig,
    TrionConfig,
)
from dist_lowrank.config.schema import HubData
from dist_lowrank.optim import Apollo, Fira, Frugal, GaLore, GoLore, Grass, LDAdam, SubTrack

DEFAULT = compose()
OPTIONS = [
    f"{group}={name}"
    for group, names in group_options(config_directory()).items()
    for name in names
    if f"{group}={name}" not in ("data=text", "model=pretrained")  # these two need a path
]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes_and_survives_json(option: str) -> None:
    config = compose(["optimizer=galore", option] if option.startswith("optimizer/") else [option])
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_options_that_need_a_path_compose_with_one(tmp_path: Path) -> None:
    config = compose(["data=text", f"data.path={tmp_path}", f"model.pretrained={tmp_path}"])
    assert config.data.path == config.model.pretrained == str(tmp_path)  # type: ignore[union-attr]
    assert config.model.name == "pretrained"
    assert config.model.architecture is None


def test_overrides_reach_keys_that_the_yaml_leaves_out() -> None:
    config = compose(
        ["launcher.timeout_seconds=5", "strategy.reshard_after_forward=false", "+train.deterministic=true"]
    )
    assert config.launcher.timeout_seconds == 5
    assert not config.strategy.reshard_after_forward
    assert config.train.deterministic


def test_model_config_takes_any_field_with_and_without_plus() -> None:
    fields = compose(["model.config.hidden_size=256", "+model.config.rope_theta=1e5"]).model.config
    assert (fields["hidden_size"], fields["rope_theta"]) == (256, 1e5)


def test_an_experiment_is_laid_over_the_defaults_and_the_command_line_over_it() -> None:
    config = compose(["experiment=c4_dct_adamw", "optimizer.rank=64", "train.steps=5"])
    assert (config.model.name, config.train.global_batch_size) == ("llama_60m", 512)
    assert isinstance(config.data, HubData)
    assert isinstance(config.optimizer, DCTAdamWConfig)
    assert (config.optimizer.rank, config.train.steps) == (64, 5)


def test_rank_one_is_a_column_and_rank_one_point_zero_is_all() -> None:
    assert type(compose(["optimizer.rank=1"]).optimizer.rank) is int  # type: ignore[union-attr]
    assert type(compose(["optimizer.rank=1.0"]).optimizer.rank) is float  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "millions"), [("60m", 58.07), ("130m", 134.11), ("350m", 367.97), ("1b", 1339.08), ("7b", 6738.42)]
)
def test_llama_presets_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    fields = compose([f"model=llama_{name}"]).model.config
    hidden, inner, layers = fields["hidden_size"], fields["intermediate_size"], fields["num_hidden_layers"]
    block = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    total = 2 * fields["vocab_size"] * hidden + layers * block + hidden
    assert round(total / 1e6, 2) == millions


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.startswith("model=llama")])
def test_llama_presets_have_heads_that_divide_the_hidden_size(option: str) -> None:
    fields = compose([option]).model.config
    assert fields["hidden_size"] % (2 * fields["num_attention_heads"]) == 0  # rotary embeddings pair the head's axes


def test_the_1b_preset_has_the_heads_of_the_published_json_not_of_the_papers_table() -> None:
    fields = compose(["model=llama_1b"]).model.config
    assert (fields["num_attention_heads"], fields["num_hidden_layers"]) == (32, 24)


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("dct_adamw", DCTAdamWConfig),
        ("trion", TrionConfig),
        ("adamw", AdamWConfig),
        ("muon", MuonConfig),
        ("dion", DionConfig),
        ("dion3", Dion3Config),
    ],
)
def test_optimizer_files_list_every_key_with_the_default_of_the_schema(name: str, section: type) -> None:
    listed = OmegaConf.to_container(OmegaConf.load(config_directory() / "optimizer" / f"{name}.yaml"))
    defaults = {field.name: field.default for field in dataclasses.fields(section)}
    assert listed.keys() == defaults.keys()  # type: ignore[union-attr]
    tuned = {"name", "lr"}  # the default run may have its own learning rate
    for key in defaults.keys() - tuned:
        default = defaults[key]
        assert listed[key] == (list(default) if isinstance(default, tuple) else default), key  # type: ignore


def test_keys_of_the_configuration_can_be_interpolated() -> None:
    config = compose(["name=of-${model.name}-${optimizer.name}"])
    assert config.name == "of-llama_tiny-dct_adamw"


@pytest.mark.parametrize(
    "override",
    [
        "launcher.nproc_per_node=4",
        "telemetry.tensorboard=false",
        "strategy=ddp",
        "runs=elsewhere",
        "name=mine",
        "train.micro_batch_size=2",
        "train.export=false",
        "train.sample_tokens=0",
        "model.activation_checkpointing=true",
        "model.compile=true",
        "optimizer.transform=fft",
        "optimizer.materialize=false",
        "optimizer.kernels=triton",
        "data.cache=elsewhere",
        "data.workers=1",
    ],
)
def test_the_digest_leaves_out_what_does_not_change_the_science(override: str) -> None:
    config = compose([override])
    assert config != DEFAULT
    assert digest(config) == digest(DEFAULT)


@pytest.mark.parametrize(
    "override",
    ["seed=1", "optimizer.rank=1.0", "optimizer=trion", "precision=bf16", "data.vocab_size=1000", "train.steps=5"],
)
def test_the_digest_covers_what_changes_the_science(override: str) -> None:
    changed = digest(compose([override]))
    assert changed != digest(DEFAULT)
    assert len(changed) == 12


def test_an_installed_package_uses_the_configuration_inside_it(tmp_path: Path) -> None:
    package = Path(sys.modules["dist_lowrank"].__file__ or "").parent
    installed, empty = tmp_path / "site", tmp_path / "empty"
    shutil.copytree(package, installed / "dist_lowrank", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(config_directory(), installed / "dist_lowrank" / "conf")
    default = installed / "dist_lowrank" / "conf" / "config.yaml"
    default.write_text(default.read_text().replace("seed: 0", "seed: 77"))
    empty.mkdir()
    script = "from dist_lowrank.config import compose; print(compose().seed)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=empty, env=environment)
    assert result.stdout == "77\n"


PRESETS = {
    "galore": GaLore,
    "golore": GoLore,
    "fira": Fira,
    "frugal": Frugal,
    "apollo": Apollo,
    "ldadam": LDAdam,
    "subtrack": SubTrack,
    "grass": Grass,
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_of_the_command_line_are_those_of_python(name: str) -> None:
    config = compose([f"optimizer={name}", "model=llama_60m"]).optimizer
    options = {"switch_step": 1} if name == "golore" else {}
    defaults = PRESETS[name]([torch.nn.Parameter(torch.ones(2, 2))], **options).defaults
    for field in dataclasses.fields(config):
        if field.name not in ("name", "switch_step"):
            assert getattr(config, field.name) == defaults[field.name], field.name


def test_a_part_of_a_recipe_is_one_override() -> None:
    config = compose(["optimizer=fira", "optimizer/subspace=dct2", "optimizer/moments=adam_int8"]).optimizer
    assert isinstance(config, ProjectedConfig)
    assert (config.name, config.subspace, config.moment_dtype, config.residual) == (
        "fira",
        "dct2",
        "int8",
        "norm_scaled",
    )
