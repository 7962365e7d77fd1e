"""Adam on the coefficients of a subspace, from four named parts: subspace, moments, residual, transition.

What GaLore, GoLore, Fira, FRUGAL, APOLLO, LDAdam, SubTrack++ and Grass have in common; each of them is a preset in a
file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dist_lowrank.dictionaries import DICTIONARIES
from dist_lowrank.optim.blocks import Blocks
from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.grassmann import Grassmann
from dist_lowrank.optim.low_rank import LowRank
from dist_lowrank.optim.moments import Adam
from dist_lowrank.optim.options import ENGINE_OPTIONS, check_choice, check_rank, refuse
from dist_lowrank.optim.projections import PowerIteration, RandomizedSvd, RandomProjection, Svd, SvdThenRandom
from dist_lowrank.optim.recipe import Recipe
from dist_lowrank.optim.residuals import Accumulate, Drop, GradientScaled, NormScaled, Residual, Sign
from dist_lowrank.optim.shared_columns import columns_of
from dist_lowrank.optim.storage import Floats, Levels, Storage
from dist_lowrank.optim.subspace import Subspace

PROJECTIONS = ("svd", "randomized_svd", "power", "grassmann", "svd_then_stiefel", "gaussian", "stiefel", "coordinates")
SUBSPACES = (*PROJECTIONS, *DICTIONARIES, "shared", "blocks")
ERROR_FEEDBACKS: Mapping[str, Storage] = {
    "error_feedback": Floats(),
    "error_feedback_bf16": Floats(torch.bfloat16),
    "error_feedback_int8": Levels(8),
    "error_feedback_int4": Levels(4),
}
RESIDUALS = ("none", *ERROR_FEEDBACKS, "sign", "norm_scaled", "gradient_scaled")
DEFAULTS: dict[str, Any] = {
    "lr": 0.01,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.0,
    "rank": 0.25,
    "alpha": 1.0,
    "side": "shorter",
    "subspace": "svd",
    "refresh_interval": 200,
    "refresh_stagger": False,
    "switch_step": None,
    "dictionary_interval": 600,
    "rho": 0.908,
    "grassmann_step": 10.0,
    "block_order": "random",
    "ranking": "l2",
    "transform": "gemm",
    "materialize": True,
    "transform_precision": "fp32",
    "transition": "keep",
    "bias_correction": "step",
    "corrected_eps": True,
    "moment_dtype": None,
    "state_dtype": None,
    "residual": "none",
    "residual_scale": 1.0,
    "residual_inside": 0.0,
    "residual_per": "channel",
    "residual_limit": 1.01,
    "return_momentum": False,
    "decay_last": False,
    "weight_rounding": "nearest",
    "seed": 0,
}


class ProjectedAdam(LowRankOptimizer):
    """Adam in a subspace, put together from named parts; GaLore and its relatives are its presets.

    Args:
        lr, betas, eps, weight_decay: as AdamW's, of matrices and of the dense path.
        rank: number of directions (int) or fraction of n (float); with `blocks`, of matrices.
        alpha: factor of the lifted direction, but not of what the residual adds.
        side: as `DCTAdamW`'s; `shorter_left` sends square matrices left.
        subspace: `svd`; `randomized_svd`; `power`, one power iteration from the subspace before, on `rho` of momentum
            and `1 - rho` of gradient; `grassmann`, the subspace before, turned by `grassmann_step` towards what it
            misses; `gaussian`, `stiefel`, `coordinates`, drawn at random; `svd_then_stiefel`, drawn from `switch_step`
            on; or the columns of most energy of a dictionary, `dct2`, `dct3`, `hadamard`, `random`, `identity` (with
            `ranking`, `transform`, `materialize`, `transform_precision` as `DCTAdamW`'s), `shared` (which changes every
            `dictionary_interval` steps, a multiple of refresh_interval). Or `blocks`, FRUGAL's: whole matrices take
            turns.
        block_order: of `blocks`: `random`; `ascending`, `descending`, going round; `mirror`, up and then down.
        refresh_interval: T; directions are chosen at steps 1, T + 1, 2 T + 1, ...
        refresh_stagger: as `DCTAdamW`'s.
        transition: of the moments when the directions change: `keep`, `move`, `reset`, `move_variance`.
        bias_correction: by the `step`, or by the age of each direction, `choice`.
        corrected_eps: add eps to the bias-corrected root of the second moment, as torch's AdamW; False: to the root
            before it is corrected, as Hugging Face's.
        residual: what happens to the rest: `none`; `error_feedback`, kept and added to the next gradient (also
            `_bf16`, `_int8`, `_int4`); `sign`, `residual_scale` times its sign is added to the update; `norm_scaled`,
            added row by row, scaled as Adam scales the coefficients, with `residual_inside` of what is inside the
            subspace; `gradient_scaled`, the gradient itself so scaled in place of the direction, by `residual_per`
            `channel` or `tensor`, times the root of `residual_scale`.
        residual_limit: how much the norm of a scaled residual may grow in a step; 0: without limit.
        return_momentum: what of the momentum the new directions lack goes to the error feedback.
        decay_last: decay the updated weights; False: the weights before the update, as torch's AdamW.
        moment_dtype, state_dtype, weight_rounding, seed: as `DCTAdamW`'s.
        process_group, workspace_bytes, verify_every, agree_on_gradients: as `DCTAdamW`'s.

    Raises:
        ValueError: for an option that is not allowed, naming it, its value and what is.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        engine = {name: options.pop(name) for name in ENGINE_OPTIONS if name in options}
        for name in options:
            check_choice("option", name, tuple(DEFAULTS))
        super().__init__(params, DEFAULTS | options, **engine)

    def recipe(self, group: dict[str, Any]) -> Recipe:
        check_choice("moment_dtype", group["moment_dtype"], (None, torch.float32, torch.bfloat16, torch.int8))
        check_choice("bias_correction", group["bias_correction"], ("step", "choice"))
        by_age = group["bias_correction"] == "choice"
        _check_parts(group)
        if group["subspace"] == "blocks":
            return _blocks(group)
        same = ("lr", "weight_decay", "rank", "side", "seed", "weight_rounding", "refresh_interval", "transition")
        return LowRank(
            **{key: group[key] for key in (*same, "alpha", "decay_last", "return_momentum", "refresh_stagger")},
            refresh_after_first=True,
            subspace=_subspace(group),
            moments=Adam(group["betas"], group["eps"], by_age, group["moment_dtype"], group["corrected_eps"]),
            residual=_residual(group),
        )


def _check_parts(group: Mapping[str, Any]) -> None:
    """Refuses parts that contradict each other."""
    subspace, transition, residual = group["subspace"], group["transition"], group["residual"]
    if group["bias_correction"] == "choice" and transition != "reset" and subspace in (*PROJECTIONS, "shared"):
        # Directions of a projection turn into each other, so that none has an age.
        raise refuse("bias_correction", "choice", f"'step' with subspace={subspace!r}, or 'reset'")
    if group["bias_correction"] == "choice" and transition == "move_variance":
        raise refuse(
            "transition",
            transition,
            "keep, move, reset with bias_correction='choice' (the variance is that of moments corrected by the step)",
        )
    if subspace == "gaussian" and residual in (*ERROR_FEEDBACKS, "sign", "norm_scaled"):
        raise refuse(
            "residual",
            residual,
            "none, gradient_scaled with subspace='gaussian', whose vectors are not orthonormal, so that A - A P P^T is "
            "not what is outside of it (subspace='stiefel' is random and orthonormal)",
        )
    if group["transform_precision"] != "fp32" and subspace not in DICTIONARIES:
        raise refuse(
            "transform_precision", group["transform_precision"], f"fp32 with subspace={subspace!r}, no fixed dictionary"
        )
    if group["switch_step"] is not None and subspace != "svd_then_stiefel":
        raise refuse("switch_step", group["switch_step"], f"None with subspace={subspace!r}, which never switches")


def _subspace(group: Mapping[str, Any]) -> Subspace:
    name = group["subspace"]
    check_choice("subspace", name, SUBSPACES)
    if name in (*DICTIONARIES, "shared"):
        return columns_of(name, group)
    if name == "svd_then_stiefel":
        return SvdThenRandom(group["switch_step"])
    if name == "power":
        return PowerIteration(group["rho"])
    if name == "grassmann":
        return Grassmann(group["grassmann_step"])
    kinds = {"gaussian": "gaussian", "stiefel": "orthonormal", "coordinates": "coordinates"}
    return RandomProjection(kinds[name]) if name in kinds else Svd() if name == "svd" else RandomizedSvd()


def _blocks(group: Mapping[str, Any]) -> Blocks:
    fixed = {"transition": "reset", "bias_correction": "choice", "residual": "sign", "moment_dtype": None, "alpha": 1.0}
    fixed |= {"corrected_eps": True, "refresh_stagger": False}
    for name, value in fixed.items():
        if group[name] != value:
            raise refuse(name, group[name], f"{value} with subspace='blocks'")
    if group["higher_dims"] == "stack":
        raise refuse("higher_dims", "stack", "dense, flatten with subspace='blocks': matrices of a stack share state")
    check_rank(group["rank"])
    same = ("lr", "weight_decay", "side", "seed", "weight_rounding", "betas", "eps", "decay_last")
    return Blocks(
        **{key: group[key] for key in same},
        rank=1.0,  # all columns
        interval=group["refresh_interval"],
        fraction=group["rank"],
        order=group["block_order"],
        sign_scale=group["residual_scale"],
    )


def _residual(group: Mapping[str, Any]) -> Residual:
    name = group["residual"]
    check_choice("residual", name, RESIDUALS)
    if name in ERROR_FEEDBACKS:
        return Accumulate("error_feedback", "error_feedback", storage=ERROR_FEEDBACKS[name])
    if name == "sign":
        return Sign(group["residual_scale"])
    if name == "norm_scaled":
        return NormScaled(group["residual_limit"], group["residual_inside"])
    if name == "gradient_scaled":
        return GradientScaled(group["residual_limit"], group["residual_per"], group["residual_scale"])
    return Drop()
