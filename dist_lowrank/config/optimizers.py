"""The typed schema of the optimizers' groups.

The keys are the keyword arguments of the classes in `dist_lowrank.optim`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from dist_lowrank.config.types import STRICT, NonNegativeFloat, PositiveFloat, PositiveInt

Beta = Annotated[float, Field(ge=0, lt=1)]
# An integer is a number of columns, a float a fraction of n: `rank=1` is one column, `rank=1.0` all of them.
Rank = (
    Annotated[int, Field(ge=1, strict=True, description="number of columns")]
    | Annotated[float, Field(gt=0, le=1, strict=True, description="fraction of n")]
)
Dictionary = Literal["dct2", "dct3", "hadamard", "random", "identity", "shared"]
Transform = Literal["gemm", "fft", "auto"]
Precision = Literal["fp32", "bf16"]  # of the operands of products with a dictionary
Ranking = Literal["l2", "l1"]
Side = Literal["shorter", "longer", "right", "left", "unsharded"]
Projection = Literal[
    "svd", "randomized_svd", "power", "grassmann", "svd_then_stiefel", "gaussian", "stiefel", "coordinates"
]
ErrorFeedback = Literal["error_feedback", "error_feedback_bf16", "error_feedback_int8", "error_feedback_int4"]
AddedRows = Literal["sign", "norm_scaled", "gradient_scaled"]
Scale = Literal["spectral", "fan_ratio", "match_rms_adamw", "none"]
Orthogonalization = Literal["newton_schulz", "polar_express"]
StateDtype = Literal["weights"] | None  # null: of the arithmetic
WeightRounding = Literal["nearest", "stochastic"]  # of bf16 weights
Vocabulary = Literal["dense", "matrices"]  # the path of embeddings and output head


@dataclass(frozen=True, config=STRICT)
class DCTAdamWConfig:
    name: Literal["dct_adamw"]
    lr: PositiveFloat = 1e-3
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    rank: Rank = 0.25
    refresh_interval: PositiveInt = 1
    refresh_stagger: bool = False
    dictionary: Dictionary = "dct2"
    dictionary_interval: PositiveInt = 500  # steps between changes of `shared`
    transform: Transform = "gemm"
    materialize: bool = True
    ranking: Ranking = "l2"
    selection: Literal["current", "previous"] = "current"
    side: Side = "shorter"
    transition: Literal["move", "reset", "keep"] = "move"
    error_feedback: Literal["none", "fp32", "bf16", "int8", "int4"] = "none"
    error_feedback_momentum: bool = False
    column_bias_correction: bool = False
    moment_dtype: Literal["fp32", "bf16", "int8"] | None = None
    state_dtype: StateDtype = None
    weight_rounding: WeightRounding = "nearest"
    transform_precision: Precision = "fp32"
    kernels: Literal["torch", "triton"] = "torch"

    @model_validator(mode="after")
    def _momentum_has_where_to_go(self) -> DCTAdamWConfig:
        if self.error_feedback_momentum and (self.error_feedback == "none" or self.transition != "move"):
            raise ValueError(
                f"error_feedback_momentum: true is not allowed with error_feedback={self.error_feedback} and "
                f"transition={self.transition}; allowed: false, or error_feedback other than none and transition=move"
            )
        return self

    @model_validator(mode="after")
    def _previous_scores_are_of_the_last_step(self) -> DCTAdamWConfig:
        if self.selection == "previous" and (self.refresh_interval != 1 or self.dictionary == "shared"):
            raise ValueError(
                f"selection: previous is not allowed with refresh_interval={self.refresh_interval} and "
                f"dictionary={self.dictionary}; allowed: current, or refresh_interval=1 and a fixed dictionary"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class TrionConfig:
    name: Literal["trion"]
    lr: PositiveFloat = 0.01
    momentum: Beta = 0.95
    weight_decay: NonNegativeFloat = 0.01
    rank: Rank = 0.25
    dictionary: Dictionary = "dct2"
    dictionary_interval: PositiveInt = 500  # steps between changes of `shared`
    transform: Transform = "gemm"
    materialize: bool = True
    ranking: Ranking = "l2"
    side: Side = "shorter"
    newton_schulz_steps: PositiveInt = 5
    scale: Scale = "spectral"
    dense_lr: PositiveFloat = 3e-4
    dense_betas: tuple[Beta, Beta] = (0.9, 0.95)
    dense_eps: PositiveFloat = 1e-8
    state_dtype: StateDtype = None
    weight_rounding: WeightRounding = "nearest"
    transform_precision: Precision = "fp32"


@dataclass(frozen=True, config=STRICT)
class MuonConfig:
    name: Literal["muon"]
    lr: PositiveFloat = 0.02
    momentum: Beta = 0.95
    weight_decay: NonNegativeFloat = 0.0
    nesterov: bool = True
    scale: Scale = "spectral"
    orthogonalization: Orthogonalization = "newton_schulz"
    newton_schulz_steps: PositiveInt = 5
    newton_schulz_dtype: Literal["fp32", "bf16"] | None = None
    side: Side = "right"
    moment_dtype: Literal["fp32", "bf16"] | None = None
    dense_lr: PositiveFloat = 3e-4
    dense_betas: tuple[Beta, Beta] = (0.9, 0.95)
    dense_eps: PositiveFloat = 1e-8
    state_dtype: StateDtype = None
    weight_rounding: WeightRounding = "nearest"


@dataclass(frozen=True, config=STRICT)
class DionConfig:
    name: Literal["dion"]
    lr: PositiveFloat = 0.01
    momentum: Beta = 0.95
    weight_decay: NonNegativeFloat = 0.01
    rank: Rank = 0.25
    side: Side = "shorter"
    scale: Scale = "fan_ratio"
    moment_dtype: Literal["fp32", "bf16"] | None = None
    dense_lr: PositiveFloat = 3e-4
    dense_betas: tuple[Beta, Beta] = (0.9, 0.95)
    dense_eps: PositiveFloat = 1e-8
    state_dtype: StateDtype = None
    weight_rounding: WeightRounding = "nearest"


@dataclass(frozen=True, config=STRICT)
class Dion3Config:
    name: Literal["dion3"]
    lr: PositiveFloat = 0.01
    momentum: Beta = 0.95
    weight_decay: NonNegativeFloat = 0.01
    rank: Rank = 0.25
    neuron_beta: Beta | None = 0.95
    side: Literal[Side, "shorter_left"] = "left"
    scale: Scale = "fan_ratio"
    orthogonalization: Orthogonalization = "polar_express"
    newton_schulz_steps: PositiveInt = 5
    newton_schulz_dtype: Literal["fp32", "bf16"] | None = None
    moment_dtype: Literal["fp32", "bf16"] | None = None
    dense_lr: PositiveFloat = 3e-4
    dense_betas: tuple[Beta, Beta] = (0.9, 0.95)
    dense_eps: PositiveFloat = 1e-8
    state_dtype: StateDtype = None
    weight_rounding: WeightRounding = "nearest"


@dataclass(frozen=True, config=STRICT)
class ProjectedConfig:
    """GaLore and its relatives: Adam in a subspace, from parts (`dist_lowrank.optim.projected_adam`).

    `conf/optimizer/{subspace,moments,residual,transition}` hold the parts; the presets name four of them.
    """

    name: Literal[
        "galore", "galore2", "golore", "fira", "frugal", "apollo", "apollo_mini", "ldadam", "subtrack", "grass"
    ]
    lr: PositiveFloat = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.0
    rank: Rank = 0.25
    alpha: PositiveFloat = 1.0
    side: Literal["shorter", "shorter_left", "longer", "right", "left", "unsharded"] = "shorter"
    subspace: Literal[Projection, Dictionary, "blocks"] = "svd"
    block_order: Literal["random", "ascending", "descending", "mirror"] = "random"
    refresh_interval: PositiveInt = 200
    refresh_stagger: bool = False
    switch_step: PositiveInt | None = None  # null: after 80 % of the steps
    dictionary_interval: PositiveInt = 600  # steps between changes of `shared`; a multiple of refresh_interval
    rho: Annotated[float, Field(ge=0, le=1)] = 0.908
    grassmann_step: NonNegativeFloat = 10.0
    ranking: Ranking = "l2"
    transform: Transform = "gemm"
    materialize: bool = True
    transition: Literal["keep", "move", "reset", "move_variance"] = "keep"
    bias_correction: Literal["step", "choice"] = "step"
    corrected_eps: bool = True
    moment_dtype: Literal["fp32", "bf16", "int8"] | None = None
    state_dtype: StateDtype = None
    residual: Literal["none", ErrorFeedback, AddedRows] = "none"
    residual_scale: NonNegativeFloat = 1.0
    residual_inside: Annotated[float, Field(ge=0, le=1)] = 0.0
    residual_per: Literal["channel", "tensor"] = "channel"
    residual_limit: NonNegativeFloat = 1.01
    return_momentum: bool = False
    decay_last: bool = False
    weight_rounding: WeightRounding = "nearest"
    transform_precision: Precision = "fp32"  # with a dictionary as subspace


@dataclass(frozen=True, config=STRICT)
class SCALEConfig:
    name: Literal["scale"]
    lr: PositiveFloat = 1e-3
    momentum: Beta = 0.9  # of the output head
    moment_dtype: Literal["fp32", "bf16"] | None = None
    weight_decay: NonNegativeFloat = 0.0
    dense_lr: PositiveFloat = 1e-3
    dense_betas: tuple[Beta, Beta] = (0.9, 0.999)
    dense_eps: PositiveFloat = 1e-8
    vocabulary: Vocabulary = "matrices"
    weight_rounding: WeightRounding = "nearest"


@dataclass(frozen=True, config=STRICT)
class AdafactorConfig:
    name: Literal["adafactor"]
    lr: PositiveFloat = 1e-3
    beta1: Beta | None = None  # of momentum; null: without
    decay_rate: Annotated[float, Field(le=0)] = -0.8
    eps: PositiveFloat = 1e-30
    clip_threshold: PositiveFloat = 1.0
    weight_decay: NonNegativeFloat = 0.0
    dense_betas: tuple[Beta, Beta] = (0.9, 0.999)
    dense_eps: PositiveFloat = 1e-8
    vocabulary: Vocabulary = "matrices"
    weight_rounding: WeightRounding = "nearest"


@dataclass(frozen=True, config=STRICT)
class CAMEConfig:
    name: Literal["came"]
    lr: PositiveFloat = 2e-4
    betas: tuple[Beta, Beta, Beta] = (0.9, 0.95, 0.995)
    eps: tuple[PositiveFloat, PositiveFloat] = (1e-30, 1e-16)
    clip_threshold: PositiveFloat = 1.0
    weight_decay: NonNegativeFloat = 0.0
    dense_betas: tuple[Beta, Beta] = (0.9, 0.999)
    dense_eps: PositiveFloat = 1e-8
    vocabulary: Vocabulary = "matrices"
    weight_rounding: WeightRounding = "nearest"


@dataclass(frozen=True, config=STRICT)
class SMMFConfig:
    name: Literal["smmf"]
    lr: PositiveFloat = 1e-3
    beta: Beta = 0.9
    eps: PositiveFloat = 1e-8
    growth: Annotated[float, Field(ge=0, le=1)] = 0.999
    gamma: Annotated[float, Field(le=0)] = -0.5
    weight_decay: NonNegativeFloat = 0.0
    dense_betas: tuple[Beta, Beta] = (0.9, 0.999)
    dense_eps: PositiveFloat = 1e-8
    vocabulary: Vocabulary = "matrices"
    weight_rounding: WeightRounding = "nearest"


@dataclass(frozen=True, config=STRICT)
class AdamW8bitConfig:
    name: Literal["adamw8bit"]
    lr: PositiveFloat = 1e-3
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    vocabulary: Vocabulary = "matrices"
    weight_rounding: WeightRounding = "nearest"


@dataclass(frozen=True, config=STRICT)
class AdamWConfig:
    """The full-rank baseline, torch.optim.AdamW."""

    name: Literal["adamw"]
    lr: PositiveFloat = 1e-3
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
