"""The configuration: what composes, what is refused and in which words, and what the digest covers."""

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

from dist_lowrank.config import ConfigError, compose, digest, from_dict, to_dict
from dist_lowrank.config.compose import config_directory, group_options
from dist_lowrank.config.credentials import is_credential
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
RANK = "an integer >= 1 (number of columns) or a float in (0, 1] (fraction of n)"
OPTIMIZERS = ", ".join(sorted(path.stem for path in (config_directory() / "optimizer").glob("*.yaml")))
OPTIONS = [
    f"{group}={name}"
    for group, names in group_options(config_directory()).items()
    for name in names
    if f"{group}={name}" not in ("data=text", "model=pretrained")  # these two need a path
]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    return str(caught.value)


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


@pytest.mark.parametrize(
    ("override", "key", "value", "allowed"),
    [
        ("optimizer.rank=0", "optimizer.rank", "0", RANK),
        ("optimizer.rank=-3", "optimizer.rank", "-3", RANK),
        ("optimizer.rank=1.5", "optimizer.rank", "1.5", RANK),
        ("optimizer.rank=0.0", "optimizer.rank", "0.0", RANK),
        ("optimizer.rank=half", "optimizer.rank", "half", RANK),
        ("optimizer.rank=true", "optimizer.rank", "true", RANK),
        ("optimizer.rank.deep=3", "optimizer.rank", '{"deep": 3}', RANK),
        ("optimizer.dictionary=dct9", "optimizer.dictionary", "dct9", "dct2, dct3, hadamard, random, identity"),
        ("optimizer.lr=fast", "optimizer.lr", "fast", "a float > 0"),
        ("optimizer.lr=true", "optimizer.lr", "true", "a float > 0"),
        ("optimizer.lr=inf", "optimizer.lr", "Infinity", "a float > 0"),
        (
            "optimizer.betas=[0.9,2]",
            "optimizer.betas",
            "[0.9, 2]",
            "a list of 2: [a float in [0, 1), a float in [0, 1)]",
        ),
        ("optimizer.moment_dtype=int4", "optimizer.moment_dtype", "int4", "fp32, bf16, int8 or null"),
        ("optimizer.error_feedback=fp8", "optimizer.error_feedback", "fp8", "none, fp32, bf16, int8, int4"),
        ("optimizer.weight_rounding=up", "optimizer.weight_rounding", "up", "nearest, stochastic"),
        ("optimizer.error_feedback_momentum=true", "optimizer.error_feedback_momentum", "true", "other than none"),
        ("train.steps=ten", "train.steps", "ten", "an integer > 0"),
        ("train.steps=1.5", "train.steps", "1.5", "an integer > 0"),
        ('train.steps="120"', "train.steps", '"120"', "an integer > 0"),
        ("~train.steps", "train.steps", "missing", "an integer > 0"),
        ("train=3", "train", "3", "a section with the keys steps, global_batch_size"),
        ("model.compile=maybe", "model.compile", "maybe", "true or false"),
        ("model.low_rank=q_proj", "model.low_rank", "q_proj", "a list of text or null"),
        ("name=../escape", "name", "../escape", "text of letters, digits"),
        ("data=text", "data.path", "missing", "text"),
        ("optimizer.name=sgd", "optimizer.name", "sgd", "adafactor, adamw"),
        ("optimizer=sgd", "optimizer", "sgd", OPTIMIZERS),
        ("optimizer/subspace=dct2", "optimizer/subspace", "no such part", "with optimizer=apollo"),
        ("optimizer=null", "optimizer", "null", OPTIMIZERS),
        ("optimizer=[trion,adamw]", "optimizer", '["trion", "adamw"]', OPTIMIZERS),
        ("strategy.shard_size=2", "strategy.shard_size", "2", "null"),
        ("model=pretrained", "model.pretrained", "null", "a folder or hub name"),
        ("data=text data.path=/no/such/file", "data.path", "/no/such/file", "a text file, a folder"),
        (
            "model.pretrained=./no/such/folder",
            "model.pretrained",
            "./no/such/folder",
            "a folder in Hugging Face format",
        ),
        ("data.sequence_length=2000", "data.sequence_length", "2000", "at most 1024"),
        ("model.config.vocab_size=1000", "data.vocab_size", "4096", "at most 1000"),
        (
            "strategy=ddp strategy.low_rank_gradients=true",
            "strategy.low_rank_gradients",
            "optimizer.refresh_interval=1",
            "2 or more",
        ),
        (
            "strategy=ddp strategy.low_rank_gradients=true optimizer=trion",
            "strategy.low_rank_gradients",
            "optimizer=trion",
            "galore",
        ),
        (
            "strategy=ddp strategy.low_rank_gradients=true optimizer=galore optimizer/residual=norm_scaled",
            "strategy.low_rank_gradients",
            "optimizer.residual=norm_scaled",
            "none",
        ),
        ("+strategy.low_rank_gradients=true", "strategy.low_rank_gradients", "fsdp", "false"),
        ("optimizer._target_=os.system", "optimizer._target_", "os.system", "the keys of the schema"),
        ("+model.config.x={_target_:os.system}", "model.config.x._target_", "os.system", "the keys of the schema"),
        ("optimizer.rank=4,8", "optimizer.rank", "4,8", "one value per run"),
        ("hydra.run.dir=here", "hydra.run.dir", "Hydra's own", "`runs` and `name`"),
        ("name=${nothing}", "name", "nothing", "${KEY} of this configuration"),
        ("data.path=a(b", "data.path", "not an override", "key=value"),
        ("optimizer.rank", "optimizer.rank", "not an override", "key=value"),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_what_is_allowed(
    override: str, key: str, value: str, allowed: str
) -> None:
    text = refusal(*override.split())
    assert text.startswith(f"{key}: "), text
    assert value in text.removeprefix(f"{key}: ").split("allowed: ")[0], text
    assert allowed in text.split("allowed: ", 1)[1], text
    assert "\n" not in text, "one problem, one line"
    assert not any(noise in text for noise in ("constrained", "pydantic", "https://", "hydra.cc")), text


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("optimizer.rnak=4", "optimizer.rnak: 4", "did you mean rank?"),
        ("+optimizer.rnak=4", "optimizer.rnak: 4", "did you mean rank?"),
        ("++optimizer.rnak=4", "optimizer.rnak: 4", "did you mean rank?"),
        ("optimiser=trion", "optimiser: trion", "did you mean optimizer?"),
        ("optimiser.rank=4", "optimiser.rank: 4", "did you mean optimizer?"),
        ("rank=4", "rank: 4", "did you mean optimizer.rank?"),
        ("steps=4", "steps: 4", "did you mean train.steps?"),
        ("optimizer=dct_adam", "optimizer: dct_adam", "did you mean dct_adamw?"),
        ("model=lama_60m", "model: lama_60m", "did you mean llama_60m?"),
        ("optimizer.dictionary=hadamart", "optimizer.dictionary: hadamart", "did you mean hadamard?"),
    ],
)
def test_a_misspelling_is_refused_with_the_right_spelling(override: str, key: str, hint: str) -> None:
    text = refusal(override)
    assert text.startswith(f"{key} is not allowed"), text
    assert hint in text, text


def test_a_key_of_another_optimizer_is_refused_with_the_keys_of_this_one() -> None:
    assert refusal("optimizer=adamw", "optimizer.rank=4") == (
        "optimizer.rank: 4 is not allowed, no such key; allowed of optimizer: betas, eps, lr, name, weight_decay"
    )


def test_all_problems_are_told_at_once_one_line_each() -> None:
    lines = refusal("optimizer.rank=0", "train.steps=ten", "seed=-1", "optimizer.nonsense=1").splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == [
        "optimizer.nonsense",
        "optimizer.rank",
        "seed",
        "train.steps",
    ]


def test_steps_to_profile_are_a_first_and_a_last() -> None:
    assert compose(["telemetry.profile_steps=[10,12]"]).telemetry.profile_steps == (10, 12)
    assert "telemetry.profile_steps: [12, 10] is not allowed" in refusal("telemetry.profile_steps=[12,10]")


@pytest.mark.parametrize("key", ["hf_token", "data.api_key", "+model.config.password", "train.client_secret"])
def test_credentials_are_refused_without_being_repeated(key: str) -> None:
    text = refusal(f"{key}=hunter2")
    assert key.lstrip("+") in text
    assert "environment variable" in text
    assert "hunter2" not in text


CREDENTIALS = [
    ("cache", "https://me:hunter2@host/x"),
    ("cache", "https://:hunter2@host"),
    ("cache", "HTTPS://me:hunter2@host"),
    ("cache", "https://me:hun/ter2@host"),
    ("cache", "https://host/x?a=b&token=hunter2"),
    ("cache", "https://host/x?api_key=hunter2"),
    ("cache", "https://host/x?access_token=hunter2"),
    ("cache", "https://host/x?password=hunter2"),
    ("cache", "https://host/x?X-Amz-Signature=hunter2"),
    ("cache", "https://host/x?se=2030&sig=hunter2"),
    ("DB_PASS", "hunter2"),
    ("PGPASSWORD", "hunter2"),
    ("PRIVATE_KEY", "hunter2"),
    ("HEADER", "Bearer hunter2hunter2"),
    ("ANYTHING", "github_pat_11AAAAAAA0123456789_abcdefgh"),
    ("image", "me:hunter2@registry/x"),
    ("image", "me:hunter2@registry#x"),
    ("options", "--container-image=me:hunter2@registry.org/x:latest"),
    ("remote_shell", "sshpass -p hunter2 ssh"),
    ("remote_shell", "[sshpass,-p,hunter2,ssh]"),
]
NO_CREDENTIALS = [
    ("image", "registry:5000/x@sha256:0123456789abcdef"),
    ("image", "registry.org/team/x:latest@sha256:0123456789abcdef"),
    ("image", "x:22.04@sha256:0123456789abcdef"),
    ("image", "docker://x:22.04@sha256:0123456789abcdef"),
    ("image", "docker://registry:5000/x@sha256:0123456789abcdef"),
    ("image", "registry.org#team/x:latest"),
    ("pretrained", "org/name@main"),
    ("path", "hf://datasets/org/name@main/a:b"),
    ("path", "https://host:8080/x@y"),
    ("path", "/data/a:b@c/*.txt"),
    ("path", "what?token.txt"),
    ("options", "--signal=B:USR1@300"),
    ("remote_shell", "sshpass -e ssh -p 2222"),
    ("remote_shell", "ssh -tt -o BatchMode=yes"),
    ("sort_key", "name"),
    ("OLDPWD", "/data/me"),
    ("GLOO_SOCKET_IFNAME", "bond0:1"),
    ("mounts", "/scratch/text:/data"),
    ("compass", "north"),
]


def test_credentials_are_told_from_ordinary_values() -> None:
    assert [each for each in CREDENTIALS if not is_credential(*each)] == []
    assert [each for each in NO_CREDENTIALS if is_credential(*each)] == []


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("launcher.environment={DB_PASS: hunter2}", "launcher.environment.DB_PASS: credentials"),
        ("https://me:hunter2@host", "an override: credentials"),
        ("data.path={a: hunter2", "data.path: is not an override"),
    ],
)
def test_what_may_be_a_secret_is_not_repeated(override: str, key: str) -> None:
    text = refusal("launcher=slurm", override)
    assert text.startswith(key), text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    "value",
    ["${oc.env:SECRET}", "x-${oc.env:SECRET,none}", "${oc.decode:${oc.env:SECRET}}", "${${data.source}:SECRET}"],
)
@pytest.mark.parametrize("key", ["name", "train.steps"])
def test_nothing_of_the_environment_gets_into_a_configuration(
    key: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    text = refusal(f'{key}="{value}"')
    assert text.startswith(f"{key}: {value} is not allowed; allowed: ${{KEY}} of this configuration"), text
    assert "launcher.secret_environment" in text
    assert "hunter2" not in text


def test_keys_of_the_configuration_can_be_interpolated() -> None:
    config = compose(["name=of-${model.name}-${optimizer.name}"])
    assert config.name == "of-llama_tiny-dct_adamw"


@pytest.mark.parametrize("key", ["model.config.pad_token_id=3", "train.sample_tokens=5", "data.tokenizer=t5-base"])
def test_keys_about_tokens_are_no_credentials(key: str) -> None:
    compose([key])


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


def test_a_bad_key_is_refused_before_torch_is_imported() -> None:
    script = (
        "import sys; from dist_lowrank.config import compose, ConfigError\n"
        "try: compose(sys.argv[1:])\n"
        "except ConfigError as error: print(error)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, "optimizer.rank=0"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [f"optimizer.rank: 0 is not allowed; allowed: {RANK}", "[]"]


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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=fira", "optimizer/subspace=pca"], "optimizer/subspace: pca is not allowed"),
        (["optimizer=fira", "optimizer.subspace=pca"], "optimizer.subspace: pca is not allowed"),
        (["optimizer=adamw", "optimizer/subspace=dct2"], "optimizer/subspace"),
    ],
)
def test_a_part_that_does_not_exist_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


def test_steps_whose_memory_is_tracked_are_a_list_and_not_of_compiled_blocks() -> None:
    assert compose([]).telemetry.memory_tracker_steps == ()
    steps = "telemetry.memory_tracker_steps=[1,2]"
    assert compose([steps]).telemetry.memory_tracker_steps == (1, 2)
    with pytest.raises(ConfigError, match=r"telemetry.memory_tracker_steps: \[1, 2\] is not allowed .*compile=false"):
        compose([steps, "model.compile=true"])
    with pytest.raises(ConfigError, match=r"telemetry\.memory_tracker_steps"):
        compose(["telemetry.memory_tracker_steps=[0]"])
