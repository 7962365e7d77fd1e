"""The settings of the published code, for comparison with its numbers."""

from __future__ import annotations

from typing import Any

import torch

_GALORE: dict[str, Any] = {
    "lr": 0.01,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.0,
    "side": "shorter",
    "refresh_interval": 200,
    "alpha": 0.25,
    "transition": "keep",
    "corrected_eps": False,
    "decay_last": True,
}
_APOLLO: dict[str, Any] = {**_GALORE, "alpha": 1.0, "subspace": "gaussian", "residual_limit": 1.01}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "dct_adamw": {
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "refresh_interval": 1,
        "dictionary": "dct3",
        "ranking": "l1",
        "side": "shorter",
        "transition": "keep",
        "error_feedback": "none",
        "column_bias_correction": False,
    },
    "trion": {
        "lr": 0.01,
        "momentum": 0.95,
        "weight_decay": 0.01,
        "dictionary": "dct3",
        "ranking": "l1",
        "side": "shorter",
        "newton_schulz_steps": 5,
        "scale": "spectral",
        "dense_lr": 3e-4,
        "dense_betas": (0.9, 0.95),
        "dense_eps": 1e-10,
    },
    "galore": _GALORE,
    "golore": {**_GALORE, "lr": 1e-3},
    "fira": {**_GALORE, "residual_inside": 0.75, "residual_limit": 1.01},
    "apollo": {**_APOLLO, "residual_per": "channel", "residual_scale": 1.0},
    "apollo_mini": {**_APOLLO, "rank": 1, "residual_per": "tensor", "residual_scale": 128.0},
    "subtrack": {
        **_GALORE,
        "lr": 1e-3,
        "transition": "move_variance",
        "grassmann_step": 10.0,
        "residual_inside": 0.75,
        "residual_limit": 1.01,
    },
    "frugal": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "rank": 0.25,
        "refresh_interval": 200,
        "subspace": "blocks",
        "block_order": "random",
        "residual_scale": 1.0,
    },
    "grass": {**_GALORE, "transition": "reset", "corrected_eps": True, "decay_last": False},
    "muon": {
        "lr": 0.02,
        "momentum": 0.95,
        "weight_decay": 0.0,
        "nesterov": True,
        "scale": "spectral",
        "orthogonalization": "newton_schulz",
        "newton_schulz_steps": 5,
        "newton_schulz_dtype": torch.bfloat16,
        "state_dtype": "weights",
        "dense_lr": 3e-4,
        "dense_betas": (0.9, 0.95),
        "dense_eps": 1e-10,
    },
    "dion": {
        "lr": 0.01,
        "momentum": 0.95,
        "weight_decay": 0.01,
        "rank": 1.0,
        "side": "shorter",
        "scale": "fan_ratio",
        "state_dtype": "weights",
        "dense_betas": (0.9, 0.95),
        "dense_eps": 1e-8,
    },
    "dion3": {
        "lr": 0.01,
        "momentum": 0.95,
        "weight_decay": 0.01,
        "rank": 0.25,
        "neuron_beta": 0.95,
        "side": "left",
        "scale": "fan_ratio",
        "orthogonalization": "polar_express",
        "newton_schulz_steps": 5,
        "newton_schulz_dtype": torch.bfloat16,
        "state_dtype": "weights",
        "dense_betas": (0.9, 0.95),
        "dense_eps": 1e-8,
    },
}


def published(name: str) -> dict[str, Any]:
    """Options that follow the code that the authors of an optimizer published.

    `DCTAdamW(params, lr=1e-3, rank=128, **published("dct_adamw"))`; later keys of a dict change single ones:
    `{**published("dct_adamw"), "transition": "move"}`. The command line's are `optimizer=dct_adamw_published` and so
    on. Ranks are given only where they are part of the method.

    What differs from this package's defaults, for GaLore and its relatives:

    - `galore`, `golore`, `fira`, `apollo`, `apollo_mini`, `subtrack`: `decay_last=True`: the weights that were updated
      are decayed.
    - `galore`, `golore`: `corrected_eps=False`: eps 1e-6 is added to the root of v before bias correction, so that it
      counts 30 times as much at the first step. (The others of them compare the direction with the gradient before
      correction in their papers too: there it is the default.)
    - `galore`, `golore`, `fira`: `transition="keep"`: moments stay where they are while the directions under them turn
      (`golore`'s code means to move the first, and drops the result).
    - `fira`, `subtrack`: `residual_inside=0.75`, which is 1 - alpha (at 1B and 7B, with alpha 0.0625, 0.9375): the
      residual keeps that part of what is inside the subspace.
    - `grass`: `transition="reset"`, by the paper, whose code was not published.
    - `frugal`: `subspace="blocks"`: whole matrices take turns.
    - No difference: `ldadam` (and GaLore 2, of which there is no code), which are not offered here.

    For `dct_adamw` and `trion` (arXiv 2505.17967, `ISTA-DASLab-Optimizers`, `fft_low_rank`):

    - both: `ranking="l1"`, which has no `1 - r/n` bound, and `dictionary="dct3"`, what the code's matrix product
      uses (its FFT computes `dct2`: another optimizer).
    - `dct_adamw`: `betas` (0.9, 0.999), so that a fresh column's first step is 3.2 times the learning rate, and
      `transition="keep"`, the code's `rotate_subspace=False`: a slot keeps its moments whatever column it now holds.
      `transition="move"` is its `rotate_subspace=True`. The code has no default for learning rate, weight decay and
      rank, so none are given here.
    - `trion`: `dense_eps` 1e-10. Learning rate and weight decay are those of the paper's runs (the code's defaults
      are 0.02 and 0); the paper's ranks are 128, 256 and 512.

    For `muon` (Keller Jordan's code), `dion` and `dion3` (microsoft/dion):

    - all: `state_dtype="weights"`.
    - `muon`, `dion3`: `newton_schulz_dtype` bfloat16, in which sharded runs are alike only to its rounding.
    - `muon`: `dense_eps` 1e-10. `dion`: all directions, `rank=1.0`.

    What no option reproduces:

    - `subtrack`: see `SubTrack`;
    - `dct_adamw`, `trion`: the code leaves the order of the chosen columns open, so with `"keep"` its moments mix
      differently at every call; ours ascend, with ties to the lowest index;
    - `dct_adamw`, `trion`: scores, moments and error feedback in the dtype of the parameters, Newton-Schulz in
      bfloat16: ours are float32;
    - `dct_adamw` compresses axis 1 of matrices of 512 or 1024 rows and 3584 or 4096 columns (`side="right"` in a group
      of their own does so), and sends matrices with a side of 32000 or more to AdamW (a group with `low_rank=False`);
      `trion` takes `dct2` for wide matrices (so does `dictionary="dct2"` in a group of their own);
    - `dion3` selects rows on each shard by default, ours over the whole matrix; `dion` turns matrices by their shards.

    Raises:
        ValueError: for a name that has no published settings.
    """
    if name not in _PUBLISHED:
        raise ValueError(f"published: {name!r} is not allowed; allowed: {', '.join(_PUBLISHED)}")
    return dict(_PUBLISHED[name])
