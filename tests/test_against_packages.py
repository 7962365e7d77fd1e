"""The same steps as packages that others keep, where they implement the same rule.

The references in `projected_references.py` are written from the formulas; these tests make sure that the formulas were
read as others read them. Compared in float32, in which the packages decompose.

Without a second test, because no package that installs beside a CPU build of torch implements them: GoLore, FRUGAL,
LDAdam, GaLore 2. The authors' own `galore-torch` and `apollo-torch` cannot be imported without bitsandbytes.
"""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector
from references import initial_weight, prescribed_gradients
from torch import Tensor, nn

from dist_lowrank.optim import Apollo, Fira, Frugal, GaLore, LDAdam

STEPS = 20
INTERVAL = 6  # refreshes at steps 1, 7, 13, 19
SHAPES = {"tall": (14, 6), "wide": (8, 12), "square": (9, 9)}
BETAS = (0.9, 0.99)


class AlignedProjector(GaLoreProjector):
    """Theirs, but for what differs from the published code: the sign of vectors, and when they are chosen.

    LAPACK leaves signs open, and moments that are kept at a refresh depend on them: here the largest-magnitude entry is
    positive. The published code refreshes at steps 1, T + 1, 2 T + 1, ...; theirs at 1, T, 2 T, ...
    """

    def get_orthogonal_matrix(self, weights: Tensor, projection_type: str, from_random_matrix: bool = False) -> Tensor:
        found = super().get_orthogonal_matrix(weights, projection_type, from_random_matrix)
        vectors = found if projection_type == "left" else found.T  # (n, r)
        signs = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
        return found * (signs if projection_type == "left" else signs.T)

    def project(self, grad: Tensor, num_steps: int, *args: Any, **more: Any) -> Tensor:
        return super().project(grad, num_steps - 1, *args, **more)


def assert_same_steps(ours: type, options: dict[str, Any], theirs: type, parameters: dict[str, Tensor]) -> None:
    """Every weight equals after every step.

    Args:
        theirs: makes the package's optimizer of a list of parameters.
        parameters: initial weights by name.
    """
    mine, other = ([nn.Parameter(w.clone()) for w in parameters.values()] for _ in range(2))
    optimizers = ours(list(zip(parameters, mine, strict=True)), **options), theirs(other)
    gradients = [prescribed_gradients(tuple(w.shape), STEPS, seed=i) for i, w in enumerate(parameters.values())]
    for step in range(STEPS):
        for group in (mine, other):
            for weight, gradient in zip(group, gradients, strict=True):
                weight.grad = gradient[step].to(weight.dtype).clone()
        for optimizer in optimizers:
            optimizer.step()
        for name, left, right in zip(parameters, mine, other, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=2e-5, msg=lambda m, n=name, s=step: f"{n}, {s}: {m}")


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: initial_weight(shape).to(dtype) for name, shape in SHAPES.items()}


def with_aligned_projectors(make: type, parameters: list[nn.Parameter], rank: int, alpha: float, **options: Any) -> Any:
    group = {"params": parameters, "rank": rank, "update_proj_gap": INTERVAL, "scale": alpha, "projection_type": "std"}
    made = make([group], lr=0.01, betas=BETAS, eps=1e-6, **options)
    for parameter in parameters:
        made.state[parameter]["projector"] = AlignedProjector(rank, INTERVAL, alpha, "std")
    return made


PUBLISHED = {
    "lr": 0.01,
    "betas": BETAS,
    "eps": 1e-6,
    "weight_decay": 0.1,
    "rank": 3,
    "refresh_interval": INTERVAL,
    "alpha": 0.25,
    "transition": "keep",
    "corrected_eps": False,
    "decay_last": True,
}


@pytest.mark.parametrize(
    ("ours", "options", "theirs"),
    [
        (GaLore, {}, pytorch_optimizer.GaLore),
        (Fira, {"residual_inside": 0.75}, pytorch_optimizer.Fira),  # 1 - alpha, the code's residual
    ],
)
def test_galore_and_fira_take_the_steps_of_pytorch_optimizer(ours: type, options: dict[str, Any], theirs: type) -> None:
    """Equal to rounding once its projector has the signs and the schedule of the published code."""
    assert_same_steps(
        ours,
        PUBLISHED | options,
        lambda parameters: with_aligned_projectors(theirs, parameters, 3, 0.25, weight_decay=0.1),
        weights(),
    )


class AllAxes(GaLoreProjector):
    """Theirs, with the axes in order for its random directions."""

    def update_ortho_matrix(self, x: Tensor, from_random_matrix: bool) -> None:
        assert from_random_matrix
        self.ortho_matrix = torch.eye(x.shape[0])


@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_apollo_takes_the_steps_of_pytorch_optimizer_where_nothing_is_outside_the_subspace(per: str) -> None:
    """Theirs is another method: it scales the *projected* gradient and lifts that; the paper, and its code, scales
    the gradient itself. With all axes as directions nothing is outside, and the two agree, limiter included. Without
    decay, which theirs multiplies by the step's bias correction.
    """
    square = {"square": initial_weight((9, 9)).float()}

    def theirs(parameters: list[nn.Parameter]) -> Any:
        made = with_aligned_projectors(pytorch_optimizer.APOLLO, parameters, 9, 4.0, scale_type=per)
        for parameter in parameters:
            made.state[parameter]["projector"] = AllAxes(9, INTERVAL, 1.0, "std")
        return made

    options = {**PUBLISHED, "weight_decay": 0.0, "decay_last": False, "rank": 9, "alpha": 1.0}
    assert_same_steps(Apollo, {**options, "subspace": "identity", "per": per, "scale": 4.0}, theirs, square)


@pytest.mark.parametrize(
    ("ours", "options"),
    [
        (GaLore, {"alpha": 1.0}),
        (Frugal, {"refresh_interval": 100}),  # a refresh starts anew, which AdamW does not
        (LDAdam, {"betas": BETAS, "error_feedback": False}),
        (Fira, {"alpha": 1.0, "corrected_eps": True}),  # nothing is outside: no residual
    ],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_on_all_axes_the_family_is_torchs_adamw(ours: type, options: dict[str, Any], weight_decay: float) -> None:
    shared = {"lr": 0.01, "betas": BETAS, "eps": 1e-8, "weight_decay": weight_decay}
    own = {"rank": 1.0, "subspace": "identity", "refresh_interval": 3, **options}
    assert_same_steps(
        ours, shared | own, lambda parameters: torch.optim.AdamW(parameters, **shared), weights(torch.float64)
    )
