"""Adam on the coefficients of a subspace: what GaLore, Fira, FRUGAL, APOLLO, LDAdam and GoLore have in common.

Each of them is a subclass that names its parts: the subspace by default, what happens to the rest, and the defaults
that its authors published.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_lowrank.dictionaries import DICTIONARIES
from dist_lowrank.optim.columns import DictionaryColumns
from dist_lowrank.optim.dense import DenseOptions
from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.moments import Adam
from dist_lowrank.optim.options import check_choice
from dist_lowrank.optim.projections import PowerIteration, RandomizedSvd, RandomProjection, Svd
from dist_lowrank.optim.recipe import Recipe
from dist_lowrank.optim.residuals import Drop, Residual
from dist_lowrank.optim.subspace import Subspace

PROJECTIONS: dict[str, Subspace] = {
    "svd": Svd(),
    "randomized_svd": RandomizedSvd(),
    "power": PowerIteration(),
    "gaussian": RandomProjection("gaussian"),
    "stiefel": RandomProjection("orthonormal"),
    "coordinates": RandomProjection("coordinates"),
}
SUBSPACES = (*PROJECTIONS, *DICTIONARIES)
# Of the engine, not of a parameter group.
_ENGINE_OPTIONS = ("process_group", "workspace_bytes", "verify_every", "agree_on_gradients")


class ProjectedAdam(LowRankOptimizer):
    """Adam in a subspace; see the subclasses.

    What all of them take, beside their own options and those of `LowRankOptimizer`:

    Args:
        lr, betas, eps, weight_decay: as AdamW's, of matrices and of the dense path.
        rank: number of directions (int) or fraction of n (float).
        refresh_interval: T; directions are chosen at steps 1, T + 1, 2 T + 1, ...
        subspace: `svd`; `randomized_svd`; `power`, one power iteration from the subspace before; `gaussian`, `stiefel`,
            `coordinates`, drawn at random; or the columns of most energy of a dictionary, `dct2`, `dct3`, `hadamard`,
            `random`, `identity`.
        transition: of the moments when the directions change: `keep`, `move`, `reset`, `move_variance`.
        side: as `DCTAdamW`'s; `shorter` is the published choice.
        corrected_eps: add eps to the bias-corrected root of the second moment, as torch's AdamW; False: to the root
            before it is corrected, as Hugging Face's.
        decay_last: decay the updated weights; False: the weights before the update, as torch's AdamW.
        moment_dtype, weight_rounding, seed, ranking, transform, materialize: as `DCTAdamW`'s.

    Raises:
        ValueError: for an option that is not allowed, naming it, its value and what is.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "weight_decay": 0.0,
            "rank": 0.25,
            "refresh_interval": 200,
            "subspace": "svd",
            "transition": "keep",
            "side": "shorter",
            "alpha": 1.0,
            "corrected_eps": True,
            "decay_last": False,
            "bias_correction": "step",
            "moment_dtype": None,
            "weight_rounding": "nearest",
            "seed": 0,
            "ranking": "l2",
            "transform": "gemm",
            "materialize": True,
        }
        engine = {name: options.pop(name) for name in _ENGINE_OPTIONS if name in options}
        super().__init__(params, defaults | options, **engine)

    def subspace(self, group: dict[str, Any]) -> Subspace:
        name = group["subspace"]
        check_choice("subspace", name, SUBSPACES)
        if name in PROJECTIONS:
            return PROJECTIONS[name]
        return DictionaryColumns(name, group["ranking"], group["transform"], group["materialize"], group["seed"])

    def residual(self, group: dict[str, Any]) -> Residual:
        return Drop()

    def recipe(self, group: dict[str, Any]) -> Recipe:
        check_choice("moment_dtype", group["moment_dtype"], (None, torch.float32, torch.bfloat16, torch.int8))
        shared = ("lr", "weight_decay", "rank", "side", "seed", "weight_rounding", "refresh_interval", "transition")
        by_age = group["bias_correction"] == "choice"
        return Recipe(
            **{key: group[key] for key in (*shared, "alpha", "decay_last")},
            refresh_after_first=True,
            subspace=self.subspace(group),
            moments=Adam(group["betas"], group["eps"], by_age, group["moment_dtype"], group["corrected_eps"]),
            residual=self.residual(group),
            return_momentum=group.get("error_feedback", False),
        )

    def dense_options(self, group: dict[str, Any]) -> DenseOptions:
        keys = ("lr", "betas", "eps", "weight_decay", "weight_rounding", "seed")
        return DenseOptions(**{key: group[key] for key in keys})
