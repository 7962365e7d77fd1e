"""Checks of one key against another, and against the disk, that need neither torch nor the model."""

from __future__ import annotations

import glob
import os

from dist_lowrank.config.errors import ConfigError
from dist_lowrank.config.optimizers import DCTAdamWConfig, ProjectedConfig
from dist_lowrank.config.schema import RunConfig, TextData


def check_combinations(config: RunConfig) -> None:
    """Refuses values that are fine alone but not together, and files that are not there.

    Raises:
        ConfigError: with one line per problem, each naming the key, the value and what is allowed.
    """
    problems = [
        *_missing_files(config),
        *_sizes_that_differ(config),
        *_precision_of_zero(config),
        *_low_rank_gradients(config),
        *_tracker_of_compiled(config),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _missing_files(config: RunConfig) -> list[str]:
    problems = []
    if isinstance(config.data, TextData) and config.launcher.name != "kubernetes":  # its volumes are not seen here
        for key in ("path", "validation_path"):
            pattern: str | None = getattr(config.data, key)
            if pattern is not None and not glob.glob(pattern, recursive=True) and not os.path.exists(pattern):
                problems.append(
                    f"data.{key}: {pattern} does not exist; allowed: a text file, a folder of .txt, .md or .jsonl "
                    "files, or a glob that matches some"
                )
    for key, name in (("model.pretrained", config.model.pretrained), ("data.tokenizer", config.data.tokenizer)):
        # A name such as `org/name` may be of the hub; what is clearly a path must exist.
        if name is not None and name.startswith(("/", "./", "../", "~")) and not os.path.isdir(name):
            problems.append(f"{key}: {name} does not exist; allowed: a folder in Hugging Face format, or a hub name")
    return problems


def _sizes_that_differ(config: RunConfig) -> list[str]:
    problems = []
    positions = config.model.config.get("max_position_embeddings")
    if isinstance(positions, int) and config.data.sequence_length > positions:
        problems.append(
            f"data.sequence_length: {config.data.sequence_length} is not allowed; allowed: at most {positions} "
            "(model.config.max_position_embeddings)"
        )
    vocabulary = config.model.config.get("vocab_size")
    trained = getattr(config.data, "vocab_size", None) if config.data.tokenizer is None else None
    if isinstance(vocabulary, int) and trained is not None and trained > vocabulary:
        problems.append(
            f"data.vocab_size: {trained} is not allowed; allowed: at most {vocabulary} (model.config.vocab_size)"
        )
    return problems


def _precision_of_zero(config: RunConfig) -> list[str]:
    if config.strategy.zero_stage is None or config.precision.name in ("fp32", "bf16"):
        return []
    return [
        f"precision: {config.precision.name} is not allowed with strategy={config.strategy.name}; allowed: fp32, bf16 "
        "(DeepSpeed keeps master weights in fp32)"
    ]


def _tracker_of_compiled(config: RunConfig) -> list[str]:
    """Compiled blocks allocate where no operator tells of it."""
    steps = config.telemetry.memory_tracker_steps
    if not steps or not config.model.compile:
        return []
    return [
        f"telemetry.memory_tracker_steps: {list(steps)} is not allowed with model.compile=true; allowed: [], or "
        "model.compile=false"
    ]


def _low_rank_gradients(config: RunConfig) -> list[str]:
    """What `dist_lowrank.optim.gradient_sync` refuses."""
    optimizer = config.optimizer
    if not config.strategy.low_rank_gradients:
        return []
    if isinstance(optimizer, DCTAdamWConfig):
        rest, source = f"error_feedback={optimizer.error_feedback}", f"dictionary={optimizer.dictionary}"
    elif isinstance(optimizer, ProjectedConfig):
        rest, source = f"residual={optimizer.residual}", f"subspace={optimizer.subspace}"
    else:
        return [_refused(f"optimizer={optimizer.name}", "dct_adamw, galore, galore2, golore or grass")]
    problems = []
    if not rest.endswith("=none"):
        problems.append(_refused(f"optimizer.{rest}", "none there"))
    if source.endswith(("=shared", "=blocks", "=gaussian")):
        problems.append(_refused(f"optimizer.{source}", "any other there"))
    if optimizer.transform_precision != "fp32":
        problems.append(_refused(f"optimizer.transform_precision={optimizer.transform_precision}", "fp32 there"))
    if optimizer.refresh_interval == 1 and getattr(optimizer, "selection", "current") == "current":
        problems.append(_refused("optimizer.refresh_interval=1", "2 or more there (dct_adamw: or selection=previous)"))
    return problems


def _refused(cause: str, allowed: str) -> str:
    return f"strategy.low_rank_gradients: true is not allowed with {cause}; allowed: false, or {allowed}"
