"""Routing by name: which parameters take the low-rank path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from dist_lowrank.optim.binding import canonical_name

# Beside embeddings and output heads, which are found by type.
DENSE_NAMES = (
    "*embed*",
    "*lm_head*",
    "*norm*",
    "*.wte.*",
    "*.wpe.*",
    "wte.*",
    "wpe.*",
    "head.weight",
    "*.head.weight",
    "output.weight",
)


def param_groups(
    model: nn.Module, low_rank: Iterable[str] | None = None, dense: Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """Two parameter groups, low-rank first, with names, for any optimizer here.

    Args:
        model: its trainable parameters are routed; tied ones once, by their first name.
        low_rank: glob patterns (`"*.mlp.*"`) of names; matrices that match take the low-rank path. Default: every
            matrix except embeddings, the output head and norms.
        dense: patterns that stay dense whatever `low_rank` says.

    Returns:
        `[{"params": [(name, tensor), ...]}, {"params": [...], "low_rank": False}]`, without empty groups.

    Raises:
        ValueError: a pattern that matches no trainable parameter (for `low_rank`: no matrix).
    """
    named = [(canonical_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.ndim == 2]
    forced_dense = _matching(named, "dense", dense)
    if low_rank is None:
        vocabulary = _vocabulary_parameters(model)
        chosen = {
            name
            for name, p in matrices
            if id(p) not in vocabulary and not any(fnmatchcase(name, pattern) for pattern in DENSE_NAMES)
        }
    else:
        chosen = _matching(matrices, "low_rank", low_rank)
    chosen -= forced_dense
    groups: list[dict[str, Any]] = [
        {"params": [(name, p) for name, p in named if name in chosen]},
        {"params": [(name, p) for name, p in named if name not in chosen], "low_rank": False},
    ]
    return [group for group in groups if group["params"]]


def _matching(named: Sequence[tuple[str, Tensor]], option: str, patterns: Iterable[str] | None) -> set[str]:
    if isinstance(patterns, str):
        raise ValueError(f"{option}: {patterns!r} is a string; allowed: a list of patterns")
    names: set[str] = set()
    for pattern in patterns or ():
        matches = {name for name, _ in named if fnmatchcase(name, pattern)}
        if not matches:
            kind = "matrix" if option == "low_rank" else "trainable parameter"
            examples = ", ".join(name for name, _ in named[:3])
            raise ValueError(f"{option}: pattern {pattern!r} matches no {kind}; names are like {examples}")
        names |= matches
    return names


def _vocabulary_parameters(model: nn.Module) -> set[int]:
    """Embeddings and, for transformers' models, the output head."""
    modules: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    ]
    find_head: Any = getattr(model, "get_output_embeddings", None)
    if find_head is not None and find_head() is not None:
        modules.append(find_head())
    return {id(p) for module in modules for p in module.parameters()}
