"""Routing by name: which parameters take the low-rank path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from dist_lowrank.optim.binding import canonical_name
from dist_lowrank.optim.options import check_choice

# Beside embeddings and output heads that are found by type.
EMBEDDING_NAMES = ("*embed*", "*.wte.*", "*.wpe.*", "wte.*", "wpe.*")
HEAD_NAMES = ("*lm_head*", "head.weight", "*.head.weight", "output.weight")
NORM_NAMES = ("*norm*",)
VOCABULARIES = ("dense", "matrices")


def param_groups(
    model: nn.Module,
    low_rank: Iterable[str] | None = None,
    dense: Iterable[str] | None = None,
    vocabulary: str = "dense",
) -> list[dict[str, Any]]:
    """Parameter groups with names, for any optimizer here: low-rank first, dense last.

    Args:
        model: its trainable parameters are routed; tied ones once, by their first name.
        low_rank: glob patterns (`"*.mlp.*"`) of names; matrices that match take the low-rank path. Default: every
            matrix except embeddings, the output head and norms.
        dense: patterns that stay dense whatever `low_rank` and `vocabulary` say.
        vocabulary: what is done with the matrices of embeddings and of the output head: `dense`, unless `low_rank`
            names them; or `matrices`, for optimizers that take them as such (SCALE, Adafactor, CAME, SMMF, AdamW8bit).
            These are in groups of their own, whose key `vocabulary` says which they are: `embedding`, `head`, or
            `tied`, both.

    Returns:
        `[{"params": [(name, tensor), ...]}, {"params": [...], "low_rank": False}]`, without empty groups; between them
        those of the vocabulary, if they are apart.

    Raises:
        ValueError: a pattern that matches no trainable parameter (for `low_rank`: no matrix).
    """
    named = [(canonical_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.ndim == 2]
    forced_dense = _matching(named, "dense", dense)
    check_choice("vocabulary", vocabulary, VOCABULARIES)
    of_vocabulary = _vocabulary_matrices(model, matrices)
    if low_rank is None:
        norms = {name for name, _ in matrices if _matches(name, NORM_NAMES)}
        chosen = {name for name, _ in matrices} - set(of_vocabulary) - norms
    else:
        chosen = _matching(matrices, "low_rank", low_rank)
    apart = {} if vocabulary == "dense" else {k: v for k, v in of_vocabulary.items() if k not in forced_dense}
    chosen -= forced_dense | set(apart)
    groups: list[dict[str, Any]] = [{"params": [(name, p) for name, p in named if name in chosen]}]
    for kind in ("embedding", "head", "tied"):
        groups.append({"params": [(name, p) for name, p in named if apart.get(name) == kind], "vocabulary": kind})
    left = [(name, p) for name, p in named if name not in chosen and name not in apart]
    groups.append({"params": left, "low_rank": False})
    return [group for group in groups if group["params"]]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


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


def _vocabulary_matrices(model: nn.Module, matrices: Sequence[tuple[str, Tensor]]) -> dict[str, str]:
    """By name, the matrices that are an `embedding`, the output `head`, or both, `tied`: by type, or by their name."""
    modules = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    find_head: Any = getattr(model, "get_output_embeddings", None)  # of transformers' models
    head = find_head() if find_head is not None else None
    embeddings = {id(p) for module in modules for p in module.parameters()}
    heads = {id(p) for p in head.parameters()} if head is not None else set()
    for name, p in model.named_parameters(remove_duplicate=False):
        embeddings |= {id(p)} if _matches(name, EMBEDDING_NAMES) else set()
        heads |= {id(p)} if _matches(name, HEAD_NAMES) else set()
    kinds = {(True, False): "embedding", (False, True): "head", (True, True): "tied"}
    where = {name: (id(p) in embeddings, id(p) in heads) for name, p in matrices}
    return {name: kinds[each] for name, each in where.items() if any(each)}
