"""Building a causal language model by `transformers`, and routing its parameters."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from dist_lowrank.config import ConfigError
from dist_lowrank.config.optimizers import AdamWConfig
from dist_lowrank.config.schema import CorpusData, HubData, RunConfig, TextData
from dist_lowrank.optim import param_groups
from dist_lowrank.sharding.layouts import TallForm, tall_form
from dist_lowrank.strategies import WEIGHT_DTYPES
from dist_lowrank.training.data.hub import reach_hub
from dist_lowrank.training.data.tokenizer import load_tokenizer
from dist_lowrank.training.float64 import keep_float64


def model_configuration(run: RunConfig) -> Any:
    """The `transformers` configuration of a run's model, with the tokenizer's vocabulary where none is set.

    Raises:
        ConfigError: an architecture, a field or a folder that does not exist, or a vocabulary that is too small.
    """
    config = run.model
    if config.pretrained is not None:
        try:
            if not Path(config.pretrained).is_dir():
                reach_hub("model.pretrained", config.pretrained, "model")
            found = AutoConfig.from_pretrained(config.pretrained, trust_remote_code=False)
        except (OSError, ValueError) as error:  # a ConnectionError is an OSError
            raise ConfigError(
                f"model.pretrained: {config.pretrained!r} is not allowed; allowed: a folder in Hugging Face format, or "
                f"a model of the hub that can be reached ({str(error).splitlines()[0]})"
            ) from error
    else:
        try:
            known = set(AutoConfig.for_model(config.architecture).to_dict())
        except ValueError as error:
            raise ConfigError(
                f"model.architecture: {config.architecture!r} is not allowed; allowed: a model type of transformers, "
                "such as llama, qwen3, gpt2"
            ) from error
        for key in config.config:
            if key not in known:
                raise ConfigError(
                    f"model.config.{key}: unknown field of a {config.architecture!r} model; allowed: "
                    + ", ".join(sorted(k for k in known if not k.startswith("_")))
                )
        fields = {"vocab_size": expected_vocab_size(run), **config.config}
        try:
            found = AutoConfig.for_model(config.architecture, **fields)
        except Exception as error:  # whatever the configuration class checks by itself
            raise ConfigError(f"model.config: {config.config} is not allowed; {error}") from error
    vocab_size = expected_vocab_size(run)
    if found.get_text_config().vocab_size < vocab_size:
        raise ConfigError(
            f"model.config.vocab_size: {found.get_text_config().vocab_size} is not allowed; allowed: at least "
            f"{vocab_size}, the tokenizer's vocabulary"
        )
    return found


def data_with_tokenizer(config: RunConfig) -> CorpusData | TextData | HubData:
    """The data's configuration; a pretrained model brings its tokenizer along unless another is asked for."""
    if config.model.pretrained is not None and config.data.tokenizer is None:
        return dataclasses.replace(config.data, tokenizer=config.model.pretrained)
    return config.data


def expected_vocab_size(config: RunConfig) -> int:
    """Size of the tokenizer's vocabulary; one that is still to be trained has at most `data.vocab_size`."""
    data = data_with_tokenizer(config)
    if data.tokenizer is None:
        assert not isinstance(data, HubData)
        return data.vocab_size
    try:
        return len(load_tokenizer(data.tokenizer))
    except (ValueError, ConnectionError) as error:
        raise ConfigError(str(error)) from error


def build_model(config: RunConfig, *, meta: bool = False) -> Any:
    """A model on the CPU with weights drawn from `config.seed`, the same on every rank; or without storage.

    Raises:
        ConfigError: what cannot be built.
    """
    disable_progress_bar()
    configuration = model_configuration(config)
    dtype = WEIGHT_DTYPES[config.precision.name]
    options = {"attn_implementation": config.model.attention, "trust_remote_code": False}
    with torch.device("meta") if meta else contextlib.nullcontext(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            if config.model.pretrained is not None and not meta:
                model = AutoModelForCausalLM.from_pretrained(config.model.pretrained, dtype=dtype, **options)
            else:
                model = AutoModelForCausalLM.from_config(configuration, dtype=dtype, **options)
        except (ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"model: {config.model.name!r} cannot be built: {error}") from error
    model.config.use_cache = False
    if config.model.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if dtype == torch.float64:
        keep_float64([model, *blocks(model)])
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers, as `transformers` names them: what must stay in one piece."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def route(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """`param_groups` by the patterns of the model, and by what the optimizer does with the vocabulary's matrices.

    Raises:
        ConfigError: a pattern that matches nothing.
    """
    try:
        vocabulary = getattr(config.optimizer, "vocabulary", "dense")
        return param_groups(model, config.model.low_rank, config.model.dense, vocabulary)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def low_rank_forms(groups: list[dict[str, Any]], config: RunConfig) -> dict[str, TallForm]:
    """Side and rank of each matrix on the low-rank path, by parameter name."""
    if isinstance(config.optimizer, AdamWConfig):
        return {}
    # Optimizers that have neither work on whole rows of the parameter.
    side, rank = getattr(config.optimizer, "side", "right"), getattr(config.optimizer, "rank", 1.0)
    return {
        name: tall_form((p.shape[0], p.shape[1]), side, rank)
        for group in groups
        if group.get("low_rank", True)
        for name, p in group["params"]
    }


def family(name: str) -> str:
    """What a matrix is in every layer, such as `q_proj`, from its parameter's name."""
    parts = name.removesuffix(".weight").split(".")
    return parts[-1]
