"""What an optimizer says about its columns on demand: turnover and age."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from processes import run_on_ranks
from torch import Tensor
from torch.nn import Parameter
from trajectories import both, feed, make, make_gradients, make_parameters

from dist_lowrank.optim import DCTAdamW


def gradient_in(columns: list[int]) -> Tensor:
    gradient = torch.zeros(4, 6, dtype=torch.float64)
    gradient[:, columns] = 1.0
    return gradient


def optimizer_of_identity(**options: Any) -> tuple[DCTAdamW, Parameter]:
    parameter = Parameter(torch.zeros(4, 6, dtype=torch.float64))
    return DCTAdamW([("w", parameter)], rank=4, dictionary="identity", side="right", **options), parameter


def test_turnover_is_the_share_of_columns_that_the_last_refresh_brought_in() -> None:
    optimizer, parameter = optimizer_of_identity(refresh_interval=2)
    assert optimizer.column_turnover() == {}
    choices = [[0, 1, 2, 3], [0, 1, 2, 3], [2, 3, 4, 5], [0, 1, 4, 5], [0, 1, 2, 3], [0, 1, 2, 5]]
    found = []
    for columns in choices:  # chosen at steps 1, 2, 4, 6
        feed(optimizer, [parameter], [gradient_in(columns)])
        found.append(optimizer.column_turnover()["w"])
    assert found == [1.0, 0.0, 0.0, 0.5, 0.5, 0.25]


def test_turnover_after_loading_a_state_waits_for_the_next_refresh() -> None:
    optimizer, parameter = optimizer_of_identity()
    feed(optimizer, [parameter], [gradient_in([0, 1, 2, 3])])
    saved = copy.deepcopy(optimizer.state_dict())
    feed(optimizer, [parameter], [gradient_in([2, 3, 4, 5])])
    optimizer.load_state_dict(saved)
    assert optimizer.column_turnover() == {}
    feed(optimizer, [parameter], [gradient_in([0, 1, 2, 5])])
    assert optimizer.column_turnover() == {"w": 0.25}, "against the columns that were loaded"


def test_age_counts_the_updates_since_a_column_was_chosen() -> None:
    optimizer, parameter = optimizer_of_identity(column_bias_correction=True)
    assert optimizer.column_age() == {}
    found = []
    for columns in ([0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 4], [0, 1, 2, 5]):
        feed(optimizer, [parameter], [gradient_in(columns)])
        found.append(optimizer.column_age()["w"])
    # ages by column: all 1; all 2; 3 3 3 1; 1 4 4 1
    assert found == [1.0, 2.0, 2.5, 2.5]


@both
def test_without_column_bias_correction_no_ages_are_kept_or_told(kind: str) -> None:
    parameters = make_parameters([(8, 6)])
    optimizer = make(kind, parameters)
    feed(optimizer, parameters, make_gradients([(8, 6)], 1)[0])
    assert optimizer.column_age() == {}
    assert "age" not in optimizer.state[parameters[0]]
    assert optimizer.column_turnover() == {"parameter_0": 1.0}


def _diagnostics(rank: int, kind: str) -> list[dict[str, float]]:
    parameters = make_parameters([(8, 6), (4, 10)])
    optimizer = make(kind, parameters)
    found = []
    for gradients in make_gradients([(8, 6), (4, 10)], 6):
        feed(optimizer, parameters, gradients)
        found.append(optimizer.column_turnover())
    return found


@both
def test_turnover_is_the_same_on_every_rank_as_on_one_process(kind: str) -> None:
    expected = _diagnostics(0, kind)
    assert any(0 < share < 1 for step in expected for share in step.values())
    for found in run_on_ranks(2, _diagnostics, kind):
        assert found == [pytest.approx(step) for step in expected]
