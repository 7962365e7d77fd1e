"""Error feedback accounts for every gradient, and stays bounded while gradients are."""

from __future__ import annotations

import pytest
import torch
from references import dense_dictionary, initial_weight, prescribed_gradients
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


def test_error_feedback_loses_nothing_and_stays_within_its_bound() -> None:
    shape, r = (15, 10), 3
    D = dense_dictionary("dct2", 10)
    parameter = Parameter(initial_weight(shape))
    optimizer = DCTAdamW([parameter], betas=(0.0, 0.9), rank=r, error_feedback="fp32")
    applied, total, before = torch.zeros(shape).double(), torch.zeros(shape).double(), torch.zeros(shape).double()
    for gradient in prescribed_gradients(shape, 30):
        feed(optimizer, [parameter], [gradient])
        state = optimizer.state[parameter]
        assert state["error_feedback"].dtype == torch.float32
        indices, error = (
            state["indices"].long(),
            state["error_feedback"].double(),
        )  # (r,), (L, n) in dictionary coordinates
        # With beta1 = 0 the first moment is what was applied at this step.
        applied += state["exp_avg"].double() @ D[:, indices].T
        total += gradient
        torch.testing.assert_close(applied + error @ D.T, total, rtol=0, atol=1e-5)
        assert (error[:, indices] == 0).all()
        fed = (gradient + before @ D.T).square().sum()
        assert error.square().sum() <= (1 - r / 10) * fed * (1 + 1e-6)
        before = error


@pytest.mark.parametrize("refresh_interval", [1, 4])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_returning_dropped_momentum_applies_every_gradient_in_full(beta: float, refresh_interval: int) -> None:
    """What the first moments applied, what they still will, and the error add up to the gradients."""
    D = dense_dictionary("dct2", 10)
    sums: dict[bool, torch.Tensor] = {}
    for returned in (True, False):
        parameter = Parameter(initial_weight((15, 10)))
        optimizer = DCTAdamW(
            [parameter],
            betas=(beta, 0.9),
            rank=3,
            error_feedback="fp32",
            error_feedback_momentum=returned,
            refresh_interval=refresh_interval,
        )
        total = torch.zeros(15, 10).double()
        for gradient in prescribed_gradients((15, 10), 30):
            feed(optimizer, [parameter], [gradient])
            state = optimizer.state[parameter]
            moment = state["exp_avg"] @ D[:, state["indices"].long()].T
            total += moment - gradient
        sums[returned] = total + beta / (1 - beta) * moment + state["error_feedback"].double() @ D.T
    torch.testing.assert_close(sums[True], torch.zeros_like(sums[True]), rtol=0, atol=1e-4)
    assert bool((sums[False].abs() > 0.1).any()) == (beta > 0)  # without it, momentum is lost


@pytest.mark.parametrize("error_feedback", ["int8", "int4"])
def test_low_bit_error_feedback_is_the_error_to_half_a_step_of_its_row(error_feedback: str) -> None:
    levels = 2 ** int(error_feedback.removeprefix("int")) - 1
    D = dense_dictionary("dct2", 11)
    parameter = Parameter(initial_weight((15, 11)))
    optimizer = DCTAdamW([parameter], rank=3, error_feedback=error_feedback)
    before = torch.zeros(15, 11, dtype=torch.float64)  # in coordinates, as decoded
    for gradient in prescribed_gradients((15, 11), 20):
        feed(optimizer, [parameter], [gradient])
        state = optimizer.state[parameter]
        codes, ranges = state["error_feedback"], state["error_feedback_ranges"].double()
        assert codes.dtype == torch.uint8
        if error_feedback == "int4":
            assert codes.shape == (15, 6)
            codes = torch.stack([codes % 16, codes // 16], dim=2).reshape(15, 12)[:, :11]
        stored = codes.double() * ranges[:, 1:] + ranges[:, :1]
        exact = gradient @ D + before
        exact[:, state["indices"].long()] = 0
        span = exact.amax(1, keepdim=True) - exact.amin(1, keepdim=True)
        assert ((stored - exact).abs() <= span / levels / 2 * (1 + 1e-4)).all()
        before = stored
