"""The settings of the published code, for comparison with its numbers."""

from __future__ import annotations

from typing import Any

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
}


def published(name: str) -> dict[str, Any]:
    """Options that follow the code published with arXiv 2505.17967 (`ISTA-DASLab-Optimizers`, `fft_low_rank`).

    `DCTAdamW(params, lr=1e-3, rank=128, **published("dct_adamw"))`; later keys of a dict change single ones:
    `{**published("dct_adamw"), "transition": "move"}`. The command line's are `optimizer=dct_adamw_published` and
    `optimizer=trion_published`.

    What differs from this package's defaults:

    - both: `ranking="l1"`, which has no `1 - r/n` bound, and `dictionary="dct3"`, what the code's matrix product
      uses (its FFT computes `dct2`: another optimizer).
    - `dct_adamw`: `betas` (0.9, 0.999), so that a fresh column's first step is 3.2 times the learning rate, and
      `transition="keep"`, the code's `rotate_subspace=False`: a slot keeps its moments whatever column it now holds.
      `transition="move"` is its `rotate_subspace=True`. The code has no default for learning rate, weight decay and
      rank, so none are given here.
    - `trion`: `dense_eps` 1e-10. Learning rate and weight decay are those of the paper's runs (the code's defaults
      are 0.02 and 0); the paper's ranks are 128, 256 and 512.

    What no option reproduces:

    - the code leaves the order of the chosen columns open, so with `"keep"` its moments mix differently at every call;
      ours ascend, with ties to the lowest index;
    - scores, moments and error feedback in the dtype of the parameters, Newton-Schulz in bfloat16: ours are float32;
    - `dct_adamw` compresses axis 1 of matrices of 512 or 1024 rows and 3584 or 4096 columns (`side="right"` in a group
      of their own does so), and sends matrices with a side of 32000 or more to AdamW (a group with `low_rank=False`);
      `trion` takes `dct2` for wide matrices (so does `dictionary="dct2"` in a group of their own).

    Raises:
        ValueError: for a name that has no published settings.
    """
    if name not in _PUBLISHED:
        raise ValueError(f"published: {name!r} is not allowed; allowed: {', '.join(_PUBLISHED)}")
    return dict(_PUBLISHED[name])
