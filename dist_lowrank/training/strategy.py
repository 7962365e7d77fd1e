"""What the training loop asks of a strategy, and the two ways to do it: torch's own, and DeepSpeed's engine."""

from __future__ import annotations

import io
import logging
import math
import warnings
from contextlib import nullcontext, redirect_stdout
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_lowrank.checkpoint.state import NativeState, TrainingState
from dist_lowrank.config import RunConfig
from dist_lowrank.config.deepspeed_json import deepspeed_json
from dist_lowrank.optim.engine import LowRankOptimizer
from dist_lowrank.optim.given import GivenParameters
from dist_lowrank.optim.gradient_sync import sum_coefficients
from dist_lowrank.sharding.layouts import TallForm
from dist_lowrank.strategies import apply_strategy, autocast, gradient_sync, reshard
from dist_lowrank.telemetry.memory import model_tensors
from dist_lowrank.training.model import blocks, low_rank_forms, route
from dist_lowrank.training.optimizers import make_optimizer


class Strategy(Protocol):
    """A model spread over ranks, with its optimizer. All methods are collective, but for `forward` and `tensors`."""

    model: Any  # to be called
    optimizer: torch.optim.Optimizer
    gradient_norm: float  # global, before clipping, of the last step

    def forward(self) -> Any:
        """The context of a forward pass."""

    def after_evaluation(self) -> None:
        """Frees what forward passes leave that no backward pass follows."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds to the gradient; `last` of the micro-batches of a step, it is summed over ranks."""

    def prepare(self) -> Tensor:
        """What is known of the gradient before a step: its global norm, (), or 0. Not finite: to be skipped."""

    def step(self, *, skip: bool) -> bool:
        """Clips, updates unless it should be skipped, and forgets the gradient. Returns whether it updated."""

    def tensors(self) -> dict[str, list[Tensor]]:
        """What this rank holds, by cause: weights, gradients (between `backward` and `step`), and lasting buckets that
        no collective takes as they are.
        """

    def whole_weights(self) -> dict[str, Tensor]:
        """The model's state dict on the CPU; complete on rank 0."""

    def state(self) -> TrainingState:
        """How weights and optimizer state are saved and loaded."""


def make_strategy(config: RunConfig, model: nn.Module, device: torch.device) -> Strategy:
    """Spreads a model whose parameters are equal on all ranks, and builds its optimizer."""
    if config.strategy.zero_stage is not None:
        return DeepSpeed(config, model)
    return Native(config, model, low_rank_forms(route(model, config), config), device)


class Native:
    """ddp, fsdp, hsdp."""

    def __init__(self, config: RunConfig, model: nn.Module, forms: dict[str, TallForm], device: torch.device) -> None:
        self.config, self.device = config, device
        self.model: Any = apply_strategy(model, blocks(model), config.strategy, config.precision, forms, device)
        # Sharding replaced the parameters; the names and the routing are the same.
        self.optimizer = make_optimizer(config, route(model, config))
        if config.strategy.low_rank_gradients:
            assert isinstance(self.model, DistributedDataParallel)
            assert isinstance(self.optimizer, LowRankOptimizer)
            self._buckets = sum_coefficients(self.model, self.optimizer)
        self.gradient_norm = math.nan

    def forward(self) -> Any:
        return autocast(self.config.strategy, self.config.precision, self.device)

    def after_evaluation(self) -> None:
        reshard(self.model)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        with gradient_sync(self.model, last):
            loss.backward()  # type: ignore[no-untyped-call]

    def prepare(self) -> Tensor:
        """Clips the raw gradient by its global norm."""
        limit = self.config.train.clip_norm
        norm: Any = torch.nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit)
        self._norm: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return self._norm

    def step(self, *, skip: bool) -> bool:
        if not skip:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.gradient_norm = float(self._norm)
        return not skip

    def tensors(self) -> dict[str, list[Tensor]]:
        found = model_tensors(self.model)
        if self.config.strategy.low_rank_gradients:  # else the tracker sees that buckets are sent
            found["collective_buffers"] = [*self._buckets]
        return found

    def whole_weights(self) -> dict[str, Tensor]:
        module = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(module, options=options)
        return weights

    def state(self) -> TrainingState:
        return NativeState(self.model, self.optimizer)


class DeepSpeed:
    """zero0 to zero3. DeepSpeed sums, clips and checks gradients itself, and calls the optimizer."""

    def __init__(self, config: RunConfig, model: nn.Module) -> None:
        import deepspeed

        from dist_lowrank.strategies import deepspeed as adapter  # before deepspeed is used

        self.adapter = adapter
        deepspeed.utils.logger.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # names that DeepSpeed still uses
        self.optimizer = make_optimizer(config, route(model, config))
        self.given = GivenParameters()  # before DeepSpeed puts others in their place
        self.given.remember(self.optimizer.param_groups, only_known=False)
        settings = deepspeed_json(config, dist.get_world_size())
        with redirect_stdout(io.StringIO()):  # it prints memory reports
            self.model, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=settings)
        if isinstance(self.optimizer, LowRankOptimizer):
            adapter.bind(self.model)
        self.checks_gradients = self.model.optimizer is not self.optimizer  # all but stage 0 in fp32
        self.gradient_norm = math.nan

    def forward(self) -> Any:
        return nullcontext()

    def after_evaluation(self) -> None:
        pass

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss, scale_wrt_gas=False)  # the loss is a part of the mean already

    def prepare(self) -> Tensor:
        if self.checks_gradients:
            return torch.zeros((), device=self.model.device)
        self._norm: Tensor = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return self._norm

    def step(self, *, skip: bool) -> bool:
        if skip and not self.checks_gradients:
            self.model.zero_grad()
        else:
            self.model.step()
            skip = not self.model.was_step_applied()
        self.gradient_norm = float(self.model.get_global_grad_norm() if self.checks_gradients else self._norm)
        return not skip

    def tensors(self) -> dict[str, list[Tensor]]:
        return self.adapter.held_tensors(self.model)

    def whole_weights(self) -> dict[str, Tensor]:
        return self.adapter.whole_weights(self.model)

    def state(self) -> TrainingState:
        from dist_lowrank.strategies.deepspeed_state import engine_state

        return engine_state(self.model, self.optimizer, self.given)
