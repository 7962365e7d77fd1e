"""Configurations that are refused, and in which words: the key, its value, what is allowed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from refusals import refusal

from dist_lowrank.config import ConfigError, compose
from dist_lowrank.config.compose import config_directory

RANK = "an integer >= 1 (number of columns) or a float in (0, 1] (fraction of n)"
OPTIMIZERS = ", ".join(sorted(path.stem for path in (config_directory() / "optimizer").glob("*.yaml")))


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


def test_steps_whose_memory_is_tracked_are_a_list_and_not_of_compiled_blocks() -> None:
    assert compose([]).telemetry.memory_tracker_steps == ()
    steps = "telemetry.memory_tracker_steps=[1,2]"
    assert compose([steps]).telemetry.memory_tracker_steps == (1, 2)
    with pytest.raises(ConfigError, match=r"telemetry.memory_tracker_steps: \[1, 2\] is not allowed .*compile=false"):
        compose([steps, "model.compile=true"])
    with pytest.raises(ConfigError, match=r"telemetry\.memory_tracker_steps"):
        compose(["telemetry.memory_tracker_steps=[0]"])


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
