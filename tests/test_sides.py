"""The left side of a matrix is the right side of its transpose, for both optimizers and every dictionary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import initial_weight, prescribed_gradients
from torch.nn import Parameter
from trajectories import SHAPES_FOR_HADAMARD, both, feed, make


@both
@pytest.mark.parametrize("dictionary", ["dct2", "dct3", "hadamard", "random", "identity"])
@pytest.mark.parametrize("ranking", ["l2", "l1"])
def test_left_equals_right_of_the_transpose_to_1e_12(kind: str, dictionary: str, ranking: str) -> None:
    options: dict[str, Any] = {"dictionary": dictionary, "ranking": ranking}
    if kind == "trion":
        options["scale"] = "none"  # the others depend on R / C
    for rows, columns in SHAPES_FOR_HADAMARD:
        shape = (rows - rows % 2 or 2, columns - columns % 2 or 2)  # hadamard needs an even side, on both sides
        left, right = Parameter(initial_weight(shape)), Parameter(initial_weight(shape).T.contiguous())
        of_left = make(kind, [left], side="left", **options)
        of_right = make(kind, [right], side="right", **options)
        for gradient in prescribed_gradients(shape, 8):
            feed(of_left, [left], [gradient])
            feed(of_right, [right], [gradient.T.contiguous()])
            torch.testing.assert_close(left.detach(), right.detach().T, rtol=0, atol=1e-12)
            assert torch.equal(of_left.state[left]["indices"], of_right.state[right]["indices"])
