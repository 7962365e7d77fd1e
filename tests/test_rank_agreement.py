"""Ranks that must agree and do not are told so, on every rank, by name."""

from __future__ import annotations

import pytest
import torch
from processes import RankFailure, run_on_ranks
from sharded_models import SHAPES, Model, shard
from torch import nn

from dist_lowrank.optim import DCTAdamW


def _differing_replicas(rank: int) -> str:
    model = Model(SHAPES, torch.float32)
    if rank == 1:
        with torch.no_grad():
            model.get_parameter("odd.weight")[0, 0] += 1e-3
    updater = DCTAdamW(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="process_group") as caught:
        updater.step()
    return str(caught.value)


def test_replicas_that_differ_are_refused_on_every_rank_by_name() -> None:
    for message in run_on_ranks(3, _differing_replicas):
        assert "'odd.weight' (1 of 8 in all)" in message


def _own_group(rank: int) -> bool:
    groups = [torch.distributed.new_group([member]) for member in range(2)]
    torch.manual_seed(rank)
    parameter = nn.Parameter(torch.randn(6, 4))
    updater = DCTAdamW([parameter], process_group=groups[rank])
    parameter.grad = torch.randn(6, 4)
    updater.step()
    return True


def test_a_process_group_of_one_allows_a_model_of_its_own_on_each_rank() -> None:
    assert run_on_ranks(2, _own_group) == [True, True]


def _corrupted(rank: int) -> str:
    model = Model(SHAPES, torch.float32)
    shard(model, "fsdp_rows", 3, 0.5)
    updater = DCTAdamW(model.named_parameters(), rank=0.5, refresh_interval=10, verify_every=3)
    for step in range(1, 4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if step == 2 and rank == 1:
            updater.state[model.get_parameter("odd.weight")]["indices"] += 1
        if step == 3:
            with pytest.raises(RuntimeError) as caught:
                updater.step()
            return str(caught.value)
        updater.step()
    raise AssertionError


def test_a_rank_with_other_columns_is_named_with_the_parameter_on_every_rank() -> None:
    for message in run_on_ranks(3, _corrupted):
        assert "the columns chosen for 'odd.weight' on rank 1 are not those of rank 0" in message


def test_a_failing_rank_fails_the_test() -> None:
    with pytest.raises(RankFailure, match="rank 1"):
        run_on_ranks(2, _fail_on_rank_one)


def _fail_on_rank_one(rank: int) -> None:
    assert rank == 0
