"""Driving real DeepSpeed engines with prescribed gradients, on forked gloo processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.stage3  # imported before the fork, so that the ranks need not
import torch
import torch.distributed as dist
from references import initial_weight, prescribed_gradients
from torch import Tensor, nn

from dist_lowrank.optim import (
    CAME,
    SCALE,
    SMMF,
    Adafactor,
    AdamW8bit,
    DCTAdamW,
    Dion,
    Dion3,
    Muon,
    Trion,
    param_groups,
)
from dist_lowrank.strategies.deepspeed import bind

deepspeed.utils.logger.setLevel(logging.ERROR)

# Cut inside rows by any number of ranks; of `dot` one rank alone has something; 123 elements in matrices need padding.
SHAPES: dict[str, tuple[int, ...]] = {
    "tall": (7, 5),
    "wide": (5, 6),
    "bias": (5,),
    "low": (3, 7),
    "square": (6, 6),
    "dot": (1, 1),
    "kernel": (2, 3, 2),
}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dct_adamw": (DCTAdamW, {"lr": 0.02, "weight_decay": 0.1, "rank": 3, "refresh_interval": 2}),
    "dct_adamw_error_feedback": (DCTAdamW, {"lr": 0.02, "rank": 2, "error_feedback": "fp32"}),
    "trion": (Trion, {"lr": 0.02, "weight_decay": 0.1, "rank": 3}),
    "muon": (Muon, {"lr": 0.02, "weight_decay": 0.1}),
    "dion": (Dion, {"lr": 0.02, "weight_decay": 0.1, "rank": 2}),
    "dion3": (Dion3, {"lr": 0.02, "weight_decay": 0.1, "rank": 3}),
}
# Optimizers without a subspace. `vocabulary_groups` has an embedding and an output head for SCALE.
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "scale": (SCALE, {"lr": 0.02, "weight_decay": 0.1}),
    "adafactor": (Adafactor, {"lr": 0.02, "weight_decay": 0.1}),
    "came": (CAME, {"lr": 0.02}),
    "smmf": (SMMF, {"lr": 0.02}),
    "adamw8bit": (AdamW8bit, {"lr": 0.02}),
}


class Weight(nn.Module):
    """A parameter in a module of its own, which stage 3 gathers by itself."""

    def __init__(self, name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        seed = list(shapes).index(name)
        self.weight = nn.Parameter(initial_weight(shapes[name], seed=seed).float())

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight.float() * gradient).sum()


class Model(nn.Module):
    """Its gradient is what it is called with."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        self.weights = nn.ModuleDict({name: Weight(name, shapes) for name in shapes})

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        losses = [module(gradient) for module, gradient in zip(self.weights.values(), gradients, strict=True)]
        return torch.stack(losses).sum()


def gradients_of(steps: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[list[Tensor]]:
    """Float32 gradients: one list per step, one tensor per parameter."""
    each = [prescribed_gradients(shape, steps, seed=index) for index, shape in enumerate(shapes.values())]
    return [[gradient.float() for gradient in step] for step in zip(*each, strict=True)]


def configuration(stage: int, *, bf16: bool = False, accumulate: int = 1, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, **more.pop("zero", {})}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "gradient_clipping": 0.0,  # by default 1
        "steps_per_print": 10**9,
        **more,
    }


def vocabulary_groups(model: nn.Module) -> list[dict[str, Any]]:
    """`param_groups`, as of a model whose first matrix is its embedding and whose second is its output head."""
    matrices, *dense = param_groups(model)
    roles = {"weights.tall.weight": "embedding", "weights.wide.weight": "head"}
    apart = {role: [(n, p) for n, p in matrices["params"] if n == name] for name, role in roles.items()}
    hidden = [(name, p) for name, p in matrices["params"] if name not in roles]
    return [{"params": hidden}, *({"params": params, "vocabulary": role} for role, params in apart.items()), *dense]


def make_optimizer(kind: str, groups: Any, **options: Any) -> Any:
    make, defaults = (KINDS | OTHERS)[kind]
    return make(groups, **defaults | options)


def set_environment() -> None:
    """What torchrun would tell DeepSpeed."""
    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(dist.get_world_size()))


def start(config: dict[str, Any], kind: str = "dct_adamw", model: nn.Module | None = None, groups: Any = None) -> Any:
    """An engine, not yet bound."""
    set_environment()
    model = model or Model()
    optimizer = make_optimizer(kind, groups(model) if groups else param_groups(model))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def start_bound(config: dict[str, Any], kind: str = "dct_adamw", **more: Any) -> Any:
    engine = start(config, kind, **more)
    bind(engine)
    return engine


def feed(engine: Any, gradients: Sequence[Tensor]) -> None:
    """One step with this gradient; with accumulation, in unequal parts that have it as mean."""
    parts = engine.gradient_accumulation_steps()
    for index in range(parts):
        factor = 2.0 if parts > 1 and index == 0 else (parts - 2) / (parts - 1) if parts > 1 else 1.0
        loss = engine([gradient * factor for gradient in gradients])
        engine.backward(loss)
        engine.step()


def weights_of(engine: Any) -> dict[str, Tensor]:
    """The model's own weights, whole, by parameter."""
    found = {}
    for name, module in engine.module.weights.items():
        if hasattr(module.weight, "ds_id"):
            with deepspeed.zero.GatheredParameters([module.weight]):
                found[name] = module.weight.detach().clone()
        else:
            found[name] = module.weight.detach().clone()
    return found
