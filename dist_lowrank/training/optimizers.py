"""From the configuration to an optimizer and its schedule."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

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
from dist_lowrank.config.schema import RunConfig, ScheduleConfig
from dist_lowrank.optim import CAME, SCALE, SMMF, Adafactor, AdamW8bit, DCTAdamW, Dion, Dion3, Muon, Trion
from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.projected_adam import ProjectedAdam

_CLASSES: dict[type, Any] = {
    DCTAdamWConfig: DCTAdamW,
    TrionConfig: Trion,
    MuonConfig: Muon,
    DionConfig: Dion,
    Dion3Config: Dion3,
    ProjectedConfig: ProjectedAdam,
    SCALEConfig: SCALE,
    AdafactorConfig: Adafactor,
    CAMEConfig: CAME,
    SMMFConfig: SMMF,
    AdamW8bitConfig: AdamW8bit,
}
_SWITCH_FRACTION = 0.8  # of the steps, after which GoLore draws at random
_DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def make_optimizer(config: RunConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The configured optimizer for routed parameter groups."""
    options = {f.name: getattr(config.optimizer, f.name) for f in dataclasses.fields(config.optimizer)}
    del options["name"]
    options.pop("vocabulary", None)  # of `training.model.route`
    if isinstance(config.optimizer, AdamWConfig):
        groups = [{"params": group["params"]} for group in groups]
        return torch.optim.AdamW(groups, fused=True, **options)
    for key in ("moment_dtype", "newton_schulz_dtype"):
        if key in options:
            options[key] = _DTYPES[options[key]]
    if options.get("subspace") == "svd_then_stiefel" and options["switch_step"] is None:
        options["switch_step"] = max(1, round(_SWITCH_FRACTION * config.train.steps))
    # A training step leaves gradients of the same parameters on all ranks, so they need not ask each other.
    options |= {"seed": config.seed, "agree_on_gradients": False}
    make: type[LowRankOptimizer] = _CLASSES[type(config.optimizer)]
    return make(groups, **options)


def make_schedule(optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps: int) -> LambdaLR:
    """Linear warm-up, then cosine decay to `final_fraction` at the last step, or constant."""
    warmup_steps = round(config.warmup_fraction * steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if config.name == "constant":
            return 1.0
        progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
        return config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return LambdaLR(optimizer, factor)
