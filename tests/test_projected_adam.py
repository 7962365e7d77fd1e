"""GaLore and its relatives equal references from their formulas, under every sharding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from projected_references import (
    ReferenceApollo,
    ReferenceBlocks,
    ReferenceFira,
    ReferenceFrugal,
    ReferenceGrass,
    ReferenceLDAdam,
    ReferenceProjected,
    ReferenceSubTrack,
    signed,
)
from references import initial_weight, prescribed_gradients
from support_matrix import supports
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dist_lowrank.dictionaries import DictionaryCache
from dist_lowrank.optim import Apollo, DCTAdamW, Fira, Frugal, GaLore, GoLore, Grass, LDAdam, SubTrack, published
from dist_lowrank.optim.projected_adam import ProjectedAdam
from dist_lowrank.optim.projections import RandomProjection, gaussian
from dist_lowrank.optim.rounding import RandomBits
from dist_lowrank.optim.subspace import Place
from dist_lowrank.sharding.exchanged import FlatSlice
from dist_lowrank.sharding.layouts import tall_form
from dist_lowrank.sharding.pieces import FlatPart

STEPS = 20
SHAPES = {"tall": (14, 6), "wide": (8, 12), "square": (9, 9)}  # no side divides by every number of ranks
SHARED = {"lr": 0.01, "rank": 3, "refresh_interval": 6, "weight_decay": 0.1}


def _place(name: str, rank: int, step: int = 1) -> Place:
    form = tall_form(SHAPES[name], "shorter", rank)
    device = torch.device("cpu")
    return Place(form, torch.float64, device, False, DictionaryCache(), RandomBits(0, name, step), slice(None))


def _drawn(kind: str, rank: int) -> Callable[[str], Callable[[int], Tensor]]:
    """The package's own random bases, whose distribution is tested apart."""
    return lambda name: lambda number: RandomProjection(kind)._draw(_place(name, rank), number)


def _golore(name: str) -> Callable[[int], Tensor]:
    return lambda number: signed(RandomProjection("orthonormal")._draw(_place(name, 3), number))


# Optimizer and options; reference and options; basis of the reference by name of the matrix.
GALORE: dict[str, Any] = {**SHARED, "betas": (0.9, 0.999), "eps": 1e-6}
MINI: dict[str, Any] = {**GALORE, "rank": 1}
MOVED: dict[str, Any] = {**GALORE, "transition": "move"}
METHODS: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any], Any]] = {
    "galore": (GaLore, GALORE, ReferenceProjected, {**MOVED, "alpha": 0.25}, "svd"),
    "galore_published": (
        GaLore,
        {**published("galore"), **GALORE},
        ReferenceProjected,
        {**GALORE, "alpha": 0.25, "corrected_eps": False, "decay_last": True},
        "svd",
    ),
    "galore_staggered": (
        GaLore,
        {**GALORE, "refresh_stagger": True},
        ReferenceProjected,
        {**MOVED, "alpha": 0.25, "stagger": True},
        "svd",
    ),
    "galore_dct2": (
        GaLore,
        {**GALORE, "subspace": "dct2"},
        ReferenceProjected,
        {**MOVED, "alpha": 0.25},
        "dct2",
    ),
    "fira": (Fira, GALORE, ReferenceFira, {**MOVED, "alpha": 0.25, "corrected_eps": False, "inside": 0.0}, "svd"),
    "fira_published": (
        Fira,
        {**published("fira"), **GALORE},
        ReferenceFira,
        {**GALORE, "alpha": 0.25, "corrected_eps": False, "inside": 0.75, "decay_last": True},
        "svd",
    ),
    "fira_hadamard": (
        Fira,
        {**GALORE, "subspace": "dct3"},
        ReferenceFira,
        {**MOVED, "alpha": 0.25, "corrected_eps": False, "inside": 0.0},
        "dct3",
    ),
    "frugal": (
        Frugal,
        {**GALORE, "residual_scale": 0.3},
        ReferenceFrugal,
        {**GALORE, "transition": "reset", "kappa": 0.3},
        _drawn("coordinates", 3),
    ),
    "frugal_svd": (
        Frugal,
        {**GALORE, "subspace": "svd"},
        ReferenceFrugal,
        {**GALORE, "transition": "reset", "kappa": 1.0},
        "svd",
    ),
    "frugal_stiefel": (
        Frugal,
        {**GALORE, "subspace": "stiefel"},
        ReferenceFrugal,
        {**GALORE, "transition": "reset", "kappa": 1.0},
        _drawn("orthonormal", 3),
    ),
    "frugal_blocks": (
        Frugal,
        {**GALORE, "rank": 2, "subspace": "blocks", "block_order": "ascending", "residual_scale": 0.3},
        ReferenceBlocks,
        {**GALORE, "kappa": 0.3},
        "blocks",
    ),
    "apollo": (
        Apollo,
        GALORE,
        ReferenceApollo,
        {**GALORE, "corrected_eps": False, "per": "channel", "scale": 1.0},
        _drawn("gaussian", 3),
    ),
    "apollo_mini": (
        Apollo,
        {**MINI, "per": "tensor", "scale": 128.0},
        ReferenceApollo,
        {**MINI, "corrected_eps": False, "per": "tensor", "scale": 128.0},
        _drawn("gaussian", 1),
    ),
    "golore": (GoLore, {**GALORE, "switch_step": 10}, ReferenceProjected, {**MOVED, "alpha": 0.25}, None),
    "ldadam": (
        LDAdam,
        {"lr": 0.01, "rank": 3, "weight_decay": 0.1},
        ReferenceLDAdam,
        {**SHARED, "betas": (0.908, 0.99), "eps": 1e-8, "rho": 0.908, "square_left": True, "feedback": True},
        "svd",
    ),
    "ldadam_without_feedback": (
        LDAdam,
        {"lr": 0.01, "rank": 3, "error_feedback": False},
        ReferenceLDAdam,
        {
            **(SHARED | {"weight_decay": 0.0}),
            "betas": (0.908, 0.99),
            "eps": 1e-8,
            "rho": 0.908,
            "square_left": True,
            "feedback": False,
        },
        "svd",
    ),
    "subtrack": (
        SubTrack,
        {**GALORE, "grassmann_step": 0.01},  # angles of about 0.3
        ReferenceSubTrack,
        {**GALORE, "alpha": 0.25, "corrected_eps": False, "inside": 0.0, "eta": 0.01},
        "svd",
    ),
    "subtrack_published": (
        SubTrack,
        {**published("subtrack"), **GALORE},
        ReferenceSubTrack,
        {**GALORE, "alpha": 0.25, "corrected_eps": False, "inside": 0.75, "eta": 10.0, "decay_last": True},
        "svd",
    ),
    "grass_published": (
        Grass,
        {**published("grass"), **GALORE},
        ReferenceGrass,
        {**GALORE, "alpha": 0.25, "transition": "reset"},
        "identity",
    ),
    "grass": (Grass, GALORE, ReferenceGrass, {**GALORE, "alpha": 0.25, "transition": "move"}, "identity"),
}


class GoLoreReference(ReferenceProjected):
    """SVD before the switch, random from it on."""

    def choose(self, tall: Tensor) -> Tensor:
        if self.t < 10:
            return super().choose(tall)
        return self.random((self.t - 1) // self.T)


@cache
def expected(method: str) -> dict[str, list[Tensor]]:
    """By name: the weight after every step."""
    _, _, make, options, basis = METHODS[method]
    trajectories = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        if method == "golore":
            reference = GoLoreReference(initial_weight(shape), **options, random=_golore(name))
        else:
            chosen = basis if isinstance(basis, str) else basis(name)
            # Of (square, tall, wide) two at a time, going round.
            turns = [sorted(SHAPES).index(name) in pair for pair in ((0, 1), (2, 0), (1, 2), (0, 1))]
            offset = sorted(SHAPES).index(name) if options.get("stagger") else 0  # ParameterDict sorts
            reference = make(initial_weight(shape), **options, basis=chosen, offset=offset, turns=turns)
        weights = []
        for gradient in prescribed_gradients(shape, STEPS, seed=index):
            reference.step(gradient)
            weights.append(reference.weight.clone())
        trajectories[name] = weights
    return trajectories


def _trajectory(rank: int, method: str, strategy: str, world_size: int) -> dict[str, list[Tensor]]:
    make, options, *_ = METHODS[method]
    model = nn.ParameterDict({name: nn.Parameter(initial_weight(shape)) for name, shape in SHAPES.items()})
    cuts: dict[str, list[tuple[int, int]]] = {}
    if strategy in ("fsdp", "fsdp_rows", "hsdp"):
        shape, names = (
            ((2, world_size // 2), ("replicas", "shards")) if strategy == "hsdp" else ((world_size,), ("all",))
        )
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        shards = mesh.size(mesh.ndim - 1)

        def placement(p: nn.Parameter) -> Shard:
            return Shard(int(strategy != "fsdp_rows" and p.shape[0] < p.shape[1] and p.shape[1] % shards == 0))

        fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    if strategy == "flat":
        for name, shape in SHAPES.items():
            total = shape[0] * shape[1]
            borders = [0, *sorted((17 * k * total // (19 * world_size)) for k in range(1, world_size)), total]
            cuts[name] = list(pairwise(borders))
            model[name] = nn.Parameter(initial_weight(shape).flatten()[slice(*cuts[name][rank])])
    updater = make(list(model.items()), **options)
    if cuts:
        slices = {name: tuple(FlatSlice(SHAPES[name], *cut) for cut in cuts[name]) for name in SHAPES}
        updater.declare_flat_parts({p: [FlatPart(n, 0, slices[n])] for n, p in model.items()}, dist.group.WORLD)
    gradients = {name: prescribed_gradients(shape, STEPS, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    weights: dict[str, list[Tensor]] = {name: [] for name in SHAPES}
    for step in range(STEPS):
        for name, p in model.items():
            gradient = gradients[name][step]
            if cuts:
                gradient = gradient.flatten()[slice(*cuts[name][rank])]
            elif isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = gradient.clone()
        updater.step()
        for name, p in model.items():
            if cuts:
                parts: list[Any] = [None] * world_size
                dist.all_gather_object(parts, p.detach())
                weights[name].append(torch.cat(parts).view(SHAPES[name]))
            else:
                weights[name].append((p.full_tensor() if isinstance(p, DTensor) else p).detach().clone())
    return weights


def _assert_equal(found: dict[str, list[Tensor]], method: str, tolerance: float) -> None:
    for name, weights in expected(method).items():
        for step, (weight, reference) in enumerate(zip(found[name], weights, strict=True), start=1):
            difference = (weight - reference).abs().max().item()
            assert difference <= tolerance, f"{name}, step {step}: off by {difference}"


@supports("exact", strategy="one process")
@pytest.mark.parametrize("optimizer", METHODS)
def test_twenty_steps_equal_the_reference(optimizer: str) -> None:
    _assert_equal(_trajectory(0, optimizer, "one", 1), optimizer, 1e-10)


QUICK = [("ddp", 4), ("fsdp_rows", 3), ("hsdp", 4), ("flat", 3)]
SLOW = [("ddp", 2), ("ddp", 3), ("fsdp", 2), ("fsdp", 4), ("fsdp_rows", 2), ("fsdp_rows", 4), ("flat", 2), ("flat", 4)]


# Sharding does not see what published settings change.
SHARDED = [pytest.param(m, marks=pytest.mark.slow) if m.endswith("_published") else m for m in METHODS]


@supports("exact")
@pytest.mark.parametrize("optimizer", SHARDED)
@pytest.mark.parametrize(
    ("strategy", "world_size"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_twenty_steps_equal_the_reference_under_sharding(optimizer: str, strategy: str, world_size: int) -> None:
    for found in run_on_ranks(world_size, _trajectory, optimizer, strategy, world_size):
        _assert_equal(found, optimizer, 1e-9)


def test_random_numbers_of_a_matrix_are_normal_and_change_with_each_choice() -> None:
    place = _place("square", 3)
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
    vectors = RandomProjection(kind)._draw(_place("tall", 3), 5)
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
                for _ in range(30):
                    weight.grad = weight.detach() - target
                    updater.step()
                assert (weight.detach() - target).norm() < target.norm(), parts
