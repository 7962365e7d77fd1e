"""What each method may send, declared; `test_traffic.py` compares what is declared with what real steps send."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from dist_lowrank import optim
from dist_lowrank.optim.recipe import Sum, Whole
from dist_lowrank.optim.subspace import Possible

R, C, RANK = 60, 40, 5
L, N = max(R, C), min(R, C)
TOGETHER = RANK + 8  # vectors of the randomized range finder
RANGE = [N * TOGETHER, N * TOGETHER, TOGETHER**2 + 1]  # its sums
SVD = [N**2, *map(Possible, RANGE)]
# By method: options; rounds of an ordinary step and of a refresh (None: the same), each the numbers summed over ranks
# that hold rows, or the columns of a matrix that goes to its owner and back; and numbers per row between replicas.
Budget = tuple[dict[str, Any], list[Any], list[Any] | None, int]
FIRST = {"LDAdam": SVD, "SubTrack": [*SVD, 1]}  # where the first step is not as a refresh
BUDGETS: dict[str, Budget] = {
    "DCTAdamW": ({"rank": RANK, "refresh_interval": 2}, [], [N], RANK),
    "Trion": ({"rank": RANK}, [N, RANK**2], None, RANK),
    "GaLore": ({"rank": RANK}, [], SVD, RANK),
    "GaLore 2": ({"rank": RANK, "subspace": "randomized_svd"}, [], RANGE, RANK),
    "GoLore": ({"rank": RANK, "switch_step": 9}, [], SVD, RANK),
    "Grass": ({"rank": RANK}, [], [N], RANK),
    "Fira": ({"rank": RANK}, [1], [*SVD, 1], RANK + 1),
    "Fira dct2": ({"rank": RANK, "subspace": "dct2"}, [1], [N, 1], RANK + 1),
    "Frugal": ({"rank": RANK}, [], None, RANK + 1),
    "Frugal svd": ({"rank": RANK, "subspace": "svd"}, [], SVD, RANK + 1),
    "Frugal blocks": ({"subspace": "blocks"}, [], None, N),
    "Apollo": ({"rank": RANK}, [1], None, 1),
    "Apollo mini": ({"rank": 1, "per": "tensor"}, [3], None, 1),
    "LDAdam": ({"rank": RANK}, [N * RANK], None, RANK),
    "SubTrack": ({"rank": RANK}, [1], [N * RANK, 1], RANK + 1),
    "Dion": ({"rank": RANK}, [Sum(RANK**2 + 1, torch.float64), N * RANK], None, RANK),
    "Muon": ({}, [Whole(C)], None, C),
    "Dion3": ({"rank": RANK}, [R, Whole(RANK), RANK], None, RANK),
    "SCALE": ({}, [], None, 1),
    "Adafactor": ({}, [C + 1, 1], None, 1),
    "CAME": ({}, [C + 1, 1, C + 1], None, C),
    "SMMF": ({}, [2 * (50 + 48)], None, C),  # 50 * 48 = 60 * 40
    "AdamW8bit": ({}, [], None, C),
}


@pytest.mark.parametrize("method", BUDGETS)
def test_a_method_sends_no_more_than_is_declared(method: str) -> None:
    options, ordinary, refresh, per_row = BUDGETS[method]
    parameter = Parameter(torch.zeros(R, C))
    optimizer = getattr(optim, method.split()[0])([parameter], **options)
    ((bound,),) = optimizer.bind()
    ((matrix, recipe),) = optimizer.jobs(optimizer.recipe(optimizer.param_groups[0]), bound)
    form = matrix.layout.form
    assert recipe.rounds(form, refresh=False) == ordinary
    assert recipe.rounds(form, refresh=True) == (ordinary if refresh is None else refresh)
    assert recipe.first_rounds(form) == FIRST.get(method, recipe.rounds(form, refresh=True))
    assert recipe.columns_delivered(form) == per_row


def test_every_optimizer_has_a_budget() -> None:
    presets = {each.split()[0] for each in BUDGETS} | {"ProjectedAdam"}
    made = {name for name in optim.__all__ if isinstance(getattr(optim, name), type)}
    assert made - presets == {"LayoutError"}
