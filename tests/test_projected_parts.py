"""The parts of GaLore and its relatives: random bases, staggered choices, what combines and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from projected_methods import place_of
from references import initial_weight, prescribed_gradients
from torch import nn

from dist_lowrank.optim import DCTAdamW, Frugal, GaLore
from dist_lowrank.optim.projected_adam import ProjectedAdam
from dist_lowrank.optim.projections import RandomProjection, gaussian


def test_random_numbers_of_a_matrix_are_normal_and_change_with_each_choice() -> None:
    place = place_of("square", 3)
    first, again, second = (gaussian(place, "projection", number, 4000).flatten() for number in (0, 0, 1))
    assert torch.equal(first, again)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.02
    assert abs(first.mean()) < 0.02
    assert abs(first.var() - 1) < 0.03
    assert abs((first**4).mean() - 3) < 0.2
    quantiles = torch.quantile(first, torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64))
    torch.testing.assert_close(quantiles, torch.tensor([-1.96, 0, 1.96], dtype=torch.float64), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ["orthonormal", "coordinates"])
def test_random_bases_are_orthonormal(kind: str) -> None:
    vectors = RandomProjection(kind)._draw(place_of("tall", 3), 5)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3, dtype=torch.float64))


def test_a_randomized_svd_finds_the_subspace_of_a_gradient_of_low_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (40, 30)]
    gradient = factors[0] @ factors[1].T
    results = []
    for subspace in ("svd", "randomized_svd"):
        weight = nn.Parameter(torch.zeros(40, 30, dtype=torch.float64))
        updater = GaLore([weight], rank=3, subspace=subspace)
        weight.grad = gradient
        updater.step()
        results.append(updater.state[weight]["projection"])
        assert next(iter(updater.captured_energy().values())) == pytest.approx(1.0)
    torch.testing.assert_close(results[0] @ results[0].T, results[1] @ results[1].T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subspace": "pca"}, "subspace: 'pca' is not allowed; allowed: svd, randomized_svd, power"),
        ({"residual": "halve"}, "residual: 'halve' is not allowed; allowed: none, error_feedback"),
        ({"transition": "jump"}, "transition: 'jump' is not allowed; allowed: move, reset, keep, move_variance"),
        ({"subspce": "svd"}, "option: 'subspce' is not allowed; allowed: lr, betas"),
        ({"bias_correction": "choice"}, "bias_correction: 'choice' is not allowed; allowed: 'step' with"),
        ({"return_momentum": True}, "error_feedback_momentum: True is not allowed"),
        ({"subspace": "svd_then_stiefel"}, "switch_step: None is not allowed; allowed: an integer >= 1"),
        ({"residual": "sign", "residual_scale": -1.0}, "residual_scale: -1.0 is not allowed"),
        (
            {"subspace": "gaussian", "residual": "sign"},
            "residual: 'sign' is not allowed; allowed: none, gradient_scaled",
        ),
        (
            {"subspace": "blocks", "residual": "sign", "transition": "reset", "bias_correction": "choice"},
            "alpha: 0.25 is not allowed; allowed: 1.0 with subspace='blocks'",
        ),
        ({"switch_step": 5}, "switch_step: 5 is not allowed; allowed: None with subspace='svd'"),
        (
            {"subspace": "dct2", "bias_correction": "choice", "transition": "move_variance"},
            "transition: 'move_variance' is not allowed; allowed: keep, move, reset with",
        ),
        ({"refresh_stagger": True, "refresh_interval": 1}, "refresh_stagger: True is not allowed; allowed: False with"),
        ({"subspace": "grassmann", "grassmann_step": -1.0}, "grassmann_step: -1.0 is not allowed"),
    ],
)
def test_parts_that_make_no_sense_are_refused_with_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLore([nn.Parameter(torch.ones(4, 4))], **options)


def _steps_of_choices(recipe: Any, position: int, steps: int) -> list[int]:
    return [step for step in range(1, steps + 1) if recipe.at(position, 4).refreshes(step)]


def test_staggered_matrices_choose_at_the_first_step_and_then_in_turn() -> None:
    galore = GaLore([nn.Parameter(torch.ones(4, 4))], refresh_interval=3, refresh_stagger=True)
    dct = DCTAdamW([nn.Parameter(torch.ones(4, 4))], refresh_interval=3, refresh_stagger=True)
    steps = {
        make: [_steps_of_choices(each.recipe(each.param_groups[0]), position, 9) for position in range(4)]
        for make, each in (("galore", galore), ("dct", dct))
    }
    assert steps == {
        "galore": [[1, 4, 7], [1, 2, 5, 8], [1, 3, 6, 9], [1, 4, 7]],
        "dct": [[1, 3, 6, 9], [1, 4, 7], [1, 2, 5, 8], [1, 3, 6, 9]],
    }
    for each in (galore, dct):
        recipe = each.recipe(each.param_groups[0])
        for position in range(4):
            numbers = [recipe.at(position, 4).choices_before(step) for step in _steps_of_choices(recipe, position, 30)]
            assert numbers[0] == 0
            assert all(later > earlier for earlier, later in pairwise(numbers))


def test_a_staggered_run_continues_to_the_bit_from_its_saved_state() -> None:
    shapes = [(6, 4), (5, 7), (4, 4)]
    whole = [nn.Parameter(initial_weight(shape, seed=i)) for i, shape in enumerate(shapes)]
    updater = Frugal(whole, rank=2, refresh_interval=3, refresh_stagger=True)
    for step in range(12):
        if step == 5:
            halves = [nn.Parameter(p.detach().clone()) for p in whole]
            loaded = Frugal(halves, rank=2, refresh_interval=3)
            loaded.load_state_dict(updater.state_dict())
        for i, p in enumerate(whole):
            p.grad = prescribed_gradients(shapes[i], 12, seed=i)[step]
        updater.step()
        if step >= 5:
            for mine, other in zip(halves, whole, strict=True):
                mine.grad = other.grad
            loaded.step()
    assert all(torch.equal(mine, other) for mine, other in zip(halves, whole, strict=True))


def test_any_combination_of_parts_that_is_not_refused_trains() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(12, 8, generator=generator)
    for subspace in ("svd", "randomized_svd", "power", "grassmann", "gaussian", "stiefel", "coordinates", "dct2"):
        for residual in ("none", "error_feedback_int8", "sign", "norm_scaled", "gradient_scaled"):
            for transition in ("keep", "move", "reset", "move_variance"):
                if subspace == "gaussian" and residual not in ("none", "gradient_scaled"):
                    continue  # refused
                weight = nn.Parameter(torch.zeros(12, 8))
                parts = {"subspace": subspace, "residual": residual, "transition": transition}
                updater = ProjectedAdam([weight], lr=0.05, rank=3, refresh_interval=4, residual_scale=0.5, **parts)
                for _ in range(13):  # in four bases
                    weight.grad = weight.detach() - target
                    updater.step()
                assert (weight.detach() - target).norm() < target.norm(), parts
