"""Optimizers that update a matrix as it is, without a subspace: what they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.options import ENGINE_OPTIONS, check_choice

_SHARED: dict[str, Any] = {"weight_decay": 0.0, "weight_rounding": "nearest", "seed": 0}
DENSE: dict[str, Any] = {"dense_betas": (0.9, 0.999), "dense_eps": 1e-8}


class DirectOptimizer(LowRankOptimizer):
    """Base of SCALE, Adafactor, CAME, SMMF and AdamW8bit.

    Rows are those of the parameter (`side="right"`), so that nothing has to be exchanged of what is cut along
    dimension 0. Embeddings and the output head are matrices as others are, if they are given as such:
    `param_groups(model, vocabulary="matrices")`. Whatever has one dimension, and all of a group with `low_rank=False`,
    is AdamW's, with the options that begin with `dense_`.

    Args:
        params: tensors, named tensors or groups; every option can differ per group.
        own: options of the subclass.
        options: `weight_decay`, before the update, as torch's AdamW; `dense_betas`, `dense_eps`; `weight_rounding`,
            `seed`, `process_group`, `workspace_bytes`, `verify_every`, `agree_on_gradients` as `DCTAdamW`'s.

    Raises:
        ValueError: for an option that is not allowed, naming it, its value and what is.
    """

    dense_defaults: ClassVar[Mapping[str, Any]] = DENSE

    def __init__(self, params: Any, own: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        defaults = {**_SHARED, **self.dense_defaults, **own}
        for name in options:
            check_choice("option", name, (*defaults, *ENGINE_OPTIONS))
        engine = {name: options[name] for name in ENGINE_OPTIONS if name in options}
        super().__init__(params, {name: options.get(name, value) for name, value in defaults.items()}, **engine)


def recipe_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipes of these optimizers take from the options of a parameter group."""
    return {"side": "right", **{key: group[key] for key in ("lr", "weight_decay", "seed", "weight_rounding")}}
