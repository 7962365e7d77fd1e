"""What a plan says of weights, gradients and state under DeepSpeed is what its engines hold, to the byte."""

from __future__ import annotations

import deepspeed_runs  # noqa: F401 (imports DeepSpeed before the fork)
import pytest
import torch
from deepspeed_runs import set_environment
from processes import run_on_ranks
from small_runs import TINY

from dist_lowrank.config import RunConfig, compose
from dist_lowrank.planning.state import optimizer_bytes
from dist_lowrank.planning.weights import weight_bytes
from dist_lowrank.telemetry.memory import bytes_by_cause
from dist_lowrank.training.evaluate import next_token_loss
from dist_lowrank.training.model import build_model
from dist_lowrank.training.planned_parameters import planned_parameters
from dist_lowrank.training.strategy import make_strategy

RANKS = 3


def _held(rank: int, config: RunConfig) -> dict[str, int]:
    """Before the second update."""
    set_environment()
    strategy = make_strategy(config, build_model(config), torch.device("cpu"))
    for _ in range(2):
        for last in (False, True):
            strategy.backward(next_token_loss(strategy.model, torch.zeros(2, 16, dtype=torch.long)), last=last)
        strategy.prepare()
        held = bytes_by_cause(strategy.tensors(), strategy.optimizer)
        held.pop("collective_buffers", None)  # stage 3's bucket, as large as DeepSpeed's settings say
        strategy.step(skip=False)
    return {cause: count for cause, count in held.items() if count}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["dct_adamw", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["zero0", "zero1", "zero2", "zero3"])
def test_engines_hold_what_is_planned(strategy: str, precision: str, optimizer: str) -> None:
    names = [f"strategy={strategy}", f"precision={precision}", f"optimizer={optimizer}"]
    config = compose([*TINY, *names, "train.global_batch_size=12"])
    parameters = planned_parameters(config)
    planned = {**weight_bytes(config, parameters, RANKS), **optimizer_bytes(config, parameters, RANKS, step=1)}
    for rank, held in enumerate(run_on_ranks(RANKS, _held, config, timeout_seconds=200)):
        assert held == {cause: int(count[rank]) for cause, count in planned.items() if count[rank]}, rank
