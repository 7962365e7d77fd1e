"""Error feedback accounts for every gradient, and stays bounded while gradients are."""

from __future__ import annotations

import torch
from references import initial_weight
from torch.nn import Parameter
from trajectories import feed

from dist_lowrank.optim import DCTAdamW


def test_what_was_applied_and_what_is_kept_sum_to_the_gradients_exactly() -> None:
    """Integers in the identity dictionary: nothing rounds."""
    generator = torch.Generator().manual_seed(0)
    parameter = Parameter(initial_weight((15, 10)))
    optimizer = DCTAdamW([parameter], betas=(0.0, 0.9), rank=3, error_feedback="fp32", dictionary="identity")
    applied = total = torch.zeros(15, 10, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.randint(-9, 10, (15, 10), generator=generator).double()
        feed(optimizer, [parameter], [gradient])
        state = optimizer.state[parameter]
        # With beta1 = 0 the first moment is what was applied at this step.
        applied = applied.index_add(1, state["indices"].long(), state["exp_avg"])
        total = total + gradient
        assert torch.equal(applied + state["error_feedback"], total)
        assert (state["error_feedback"][:, state["indices"].long()] == 0).all()


def test_bounded_gradients_give_bounded_error_feedback() -> None:
    n, r, generator = 12, 3, torch.Generator().manual_seed(1)
    parameter = Parameter(initial_weight((20, n)))
    optimizer = DCTAdamW([parameter], rank=r, error_feedback="fp32")
    contraction = (1 - r / n) ** 0.5  # of the norm, per step
    largest = 0.0
    for _ in range(120):
        gradient = torch.randn(20, n, generator=generator, dtype=torch.float64)
        feed(optimizer, [parameter], [gradient / gradient.norm()])
        largest = max(largest, float(optimizer.state[parameter]["error_feedback"].norm()))
    assert 1 < largest <= contraction / (1 - contraction) + 1e-5
