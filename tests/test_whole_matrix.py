"""Muon, Dion and Dion3 equal references from their formulas, and themselves under every sharding."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from references import prescribed_gradients
from sharded_models import SHAPES as SHARDED_SHAPES
from sharded_models import Model, full, gradients, joined, placed_as, random_cuts, shard
from support_matrix import supports
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn import Parameter
from trajectories import SHAPES, assert_bitwise_equal, assert_equals_references, feed, make_parameters, train
from whole_references import ReferenceDion, ReferenceDion3, ReferenceMuonMatrix

from dist_lowrank.dictionaries import DictionaryCache
from dist_lowrank.optim import Dion, Dion3, Muon
from dist_lowrank.optim.orthogonalization import Orthogonalize
from dist_lowrank.optim.projections import RandomProjection
from dist_lowrank.optim.rounding import RandomBits
from dist_lowrank.optim.subspace import Place
from dist_lowrank.sharding.exchanged import flat_layout
from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.layouts import TallForm, tall_form
from dist_lowrank.sharding.pieces import FlatPart
from dist_lowrank.sharding.rounds import Task, run_rounds
from dist_lowrank.sharding.rule import OnOwner
from dist_lowrank.sharding.turns import finish

BF16 = torch.bfloat16
MUON: list[dict[str, Any]] = [
    {},
    {"nesterov": False, "momentum": 0.8, "weight_decay": 0.1},
    {"orthogonalization": "polar_express", "scale": "fan_ratio"},
    {"orthogonalization": "polar_express", "newton_schulz_steps": 7, "scale": "match_rms_adamw"},
    {"newton_schulz_steps": 2, "scale": "none", "momentum": 0.0},
]


@supports("exact", strategy="one process", optimizer="Muon")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("options", MUON, ids=str)
def test_twenty_steps_of_muon_equal_the_reference_on_either_side(options: dict[str, Any], side: str) -> None:
    parameters = make_parameters(SHAPES)
    references = [ReferenceMuonMatrix(p, **options) for p in parameters]
    assert_equals_references(Muon(parameters, side=side, **options), parameters, references)


def first_right_factor(form: TallForm, name: str) -> Tensor:
    """The package's own draw, whose distribution is tested elsewhere."""
    bits, cache = RandomBits(0, name, 1), DictionaryCache()
    place = Place(form, torch.float64, torch.device("cpu"), False, cache, bits, slice(None))
    return RandomProjection("orthonormal")._draw(place, 0)


@supports("exact", strategy="one process", optimizer="Dion")
@pytest.mark.parametrize("side", ["shorter", "right"])
@pytest.mark.parametrize(
    "options",
    [{"rank": 3}, {"rank": 0.5, "momentum": 0.8, "weight_decay": 0.1}, {"rank": 1, "scale": "spectral"}, {"rank": 1.0}],
    ids=str,
)
def test_twenty_steps_of_dion_equal_the_reference(options: dict[str, Any], side: str) -> None:
    forms = [tall_form(shape, side, options["rank"]) for shape in SHAPES]
    forms = [form for form in forms if form.rank <= form.rows]
    parameters = make_parameters([form.shape for form in forms])
    of_formula = {key: value for key, value in options.items() if key != "rank"}
    references = [
        ReferenceDion(p, first_right_factor(form, f"parameter_{i}"), left_side=form.transposed, **of_formula)
        for i, (p, form) in enumerate(zip(parameters, forms, strict=True))
    ]
    assert_equals_references(Dion(parameters, side=side, **options), parameters, references, tolerance=1e-8)


@supports("exact", strategy="one process", optimizer="Dion3")
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3},
        {"rank": 0.5, "momentum": 0.8, "neuron_beta": 0.5, "weight_decay": 0.1},
        {"rank": 1.0, "orthogonalization": "newton_schulz", "scale": "match_rms_adamw"},
        {"rank": 0.25, "neuron_beta": None},
    ],
    ids=str,
)
def test_twenty_steps_of_dion3_equal_the_reference(options: dict[str, Any]) -> None:
    parameters = make_parameters(SHAPES)
    of_formula = {key: value for key, value in options.items() if key != "rank"}
    counts = [tall_form(shape, "left", options["rank"]).rank for shape in SHAPES]
    references = [ReferenceDion3(p, count=count, **of_formula) for p, count in zip(parameters, counts, strict=True)]
    assert_equals_references(Dion3(parameters, **options), parameters, references)


def test_dion2_selects_along_the_shorter_axis() -> None:
    wide, tall = make_parameters([(6, 12)]), [Parameter(make_parameters([(6, 12)])[0].detach().T.contiguous())]
    of_wide, of_tall = (Dion3(p, rank=2, neuron_beta=None, side="shorter_left", scale="none") for p in (wide, tall))
    for gradient in prescribed_gradients((6, 12), 6):
        feed(of_wide, wide, [gradient])
        feed(of_tall, tall, [gradient.T])
        torch.testing.assert_close(wide[0].detach(), tall[0].detach().T, rtol=0, atol=1e-12)
        assert of_wide.state[wide[0]]["indices"].shape == (2,)


# Against torch's own


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "theirs"), [("spectral", "original"), ("match_rms_adamw", "match_rms_adamw")])
def test_muon_in_bf16_is_bitwise_torchs_muon(scale: str, theirs: str, nesterov: bool) -> None:
    shared: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    ours, reference = make_parameters(SHAPES, torch.float32), make_parameters(SHAPES, torch.float32)
    optimizer = Muon(ours, scale=scale, newton_schulz_dtype=BF16, **shared)
    expected = torch.optim.Muon(reference, adjust_lr_fn=theirs, **shared)
    for step in range(1, 6):
        train(optimizer, ours, steps=step, skip=step - 1)
        train(expected, reference, steps=step, skip=step - 1)
        assert_bitwise_equal([p.detach() for p in ours], [p.detach() for p in reference])


# Properties


@pytest.mark.parametrize("shape", [(3, 20, 12), (3, 12, 20), (2, 8, 8)])
@pytest.mark.parametrize(("method", "least", "most"), [("newton_schulz", 0.6, 1.3), ("polar_express", 0.8, 1.2)])
def test_orthogonalizing_brings_all_singular_values_near_one(
    shape: tuple[int, ...], method: str, least: float, most: float
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices += 2 * torch.eye(shape[1], shape[2], dtype=torch.float64)
    values = torch.linalg.svdvals(Orthogonalize(method)(matrices))
    assert values.shape == (shape[0], min(shape[1:]))
    assert least < values.min()
    assert values.max() < most


def test_matrices_of_one_shape_are_orthogonalized_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    call = Orthogonalize.__call__

    def recorded(self: Orthogonalize, matrices: Tensor) -> Tensor:
        shapes.append(tuple(matrices.shape))
        return call(self, matrices)

    monkeypatch.setattr(Orthogonalize, "__call__", recorded)
    parameters = make_parameters([(8, 6), (8, 6), (4, 10), (8, 6), (6, 8)])
    train(Muon(parameters), parameters, steps=1)
    assert shapes == [(3, 8, 6), (1, 4, 10), (1, 6, 8)]


def test_dion_keeps_a_direction_of_its_own_for_each_column_of_a_momentum_of_low_rank() -> None:
    """M of rank 2, r = 4: two columns have no direction; they are zero, and come back with the next gradient."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(20, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    parameter = Parameter(torch.zeros(20, 8))
    optimizer = Dion([parameter], lr=1.0, weight_decay=0.0, rank=4, scale="none")
    feed(optimizer, [parameter], [low])
    update = -parameter.detach()
    assert (torch.linalg.svdvals(update)[:2] > 0.5).all()  # Q's columns have length one and are not orthogonal
    assert (torch.linalg.svdvals(update)[2:] < 1e-4).all()
    assert (optimizer.state[parameter]["projection"].norm(dim=0) > 0).sum() == 2
    assert optimizer.captured_energy()["parameter_0"] == pytest.approx(1.0, abs=1e-4)
    before = parameter.detach().clone()
    feed(optimizer, [parameter], [torch.randn(20, 8, generator=generator)])
    assert (torch.linalg.svdvals(before - parameter.detach())[:4] > 0.1).all()
    assert (optimizer.state[parameter]["projection"].norm(dim=0) > 0.99).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dion_follows_the_leading_singular_vectors_of_an_ill_conditioned_momentum(dtype: torch.dtype) -> None:
    """Singular values from 100 to 1e-5: M Q has a condition number that float32 Gram matrices cannot hold."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(40, 10, generator=generator, dtype=torch.float64))[0] for _ in "lr")
    gradient = (left * torch.logspace(2, -5, 10, dtype=torch.float64)) @ right[:10].T
    parameter = Parameter(torch.zeros(40, 10, dtype=dtype))
    optimizer = Dion([parameter], lr=1.0, momentum=0.0, weight_decay=0.0, rank=6, scale="none")
    feed(optimizer, [parameter], [gradient])
    previous = parameter.detach().double().clone()
    for _ in range(8):
        optimizer.state[parameter]["momentum"].zero_()
        feed(optimizer, [parameter], [gradient])
        update, previous = previous - parameter.detach().double(), parameter.detach().double().clone()
    leading = torch.linalg.svd(gradient)
    expected = leading.U[:, :6] @ leading.Vh[:6]
    tolerance = 1e-5 if dtype == torch.float64 else 5e-3
    torch.testing.assert_close(update, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("make", [Muon, Dion, Dion3])
def test_a_zero_gradient_only_decays_the_weights_and_the_next_one_moves_them(make: Any) -> None:
    parameters = make_parameters(SHAPES, torch.float32)
    before = [p.detach().clone() for p in parameters]
    optimizer = make(parameters, lr=0.1, weight_decay=0.5)
    for _ in range(2):
        feed(optimizer, parameters, [torch.zeros_like(p) for p in parameters])
    for parameter, weight in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), weight * 0.95**2)
    train(optimizer, parameters, steps=1)
    for parameter, weight in zip(parameters, before, strict=True):
        assert (parameter.detach() - weight * 0.95**3).norm() > 0.01


@pytest.mark.parametrize("make", [Muon, Dion, Dion3])
def test_state_is_as_large_as_the_formula_says(make: Any) -> None:
    """spec: Muon 2 m n bytes, Dion 2 (m n + s r), Dion3 2 m n + 4 m and its indices, with bf16 moments."""
    rows, columns, rank = 32, 48, 8
    parameter = Parameter(torch.zeros(rows, columns))
    options = {} if make is Muon else {"rank": 0.25}
    held = make([parameter], moment_dtype=BF16, **options).memory_bytes()
    assert held["moments"] == 2 * rows * columns + (4 * rows if make is Dion3 else 0)
    assert held["projection"] == (2 * rows * rank if make is Dion else 0)
    assert held["indices"] == (rank if make is Dion3 else 0)
    half = make([Parameter(torch.zeros(rows, columns, dtype=BF16))], state_dtype="weights", **options).memory_bytes()
    assert half["moments"] == 2 * rows * columns + (2 * rows if make is Dion3 else 0)
    assert half["dense_moments"] == held["error_feedback"] == 0


@pytest.mark.parametrize("make", [Muon, Dion, Dion3])
def test_bf16_moments_follow_the_wide_ones_closely(make: Any) -> None:
    wide, narrow = make_parameters(SHAPES[:3], torch.float32), make_parameters(SHAPES[:3], torch.float32)
    options = {} if make is Muon else {"rank": 1.0}
    train(make(wide, **options), wide, steps=4)
    train(make(narrow, moment_dtype=BF16, **options), narrow, steps=4)
    for p, q in zip(wide, narrow, strict=True):
        assert 0 < (p.detach() - q.detach()).norm() < 0.02 * p.detach().norm()


# Sharding

CHECKED = (1, 4, 20)
SHARDED: dict[str, tuple[Any, dict[str, Any]]] = {
    "muon": (Muon, {"weight_decay": 0.1}),
    "muon, left": (Muon, {"side": "left", "nesterov": False}),
    "dion": (Dion, {"rank": 0.5}),
    "dion, right": (Dion, {"rank": 1, "side": "right"}),
    "dion3": (Dion3, {"rank": 0.5}),
    "dion2": (Dion3, {"rank": 0.25, "neuron_beta": None, "side": "shorter_left"}),
}
# Where matrices of one shape share an owner's call, and groups differ in what an owner computes.
MORE_SHAPES = {**SHARDED_SHAPES, "again.weight": (10, 6), "third.weight": (10, 6)}


def _trajectories(
    rank: int, strategy: str, world_size: int, dtype: torch.dtype, steps: int
) -> dict[str, list[dict[str, Tensor]]]:
    return {name: _trajectory(rank, strategy, world_size, dtype, steps, *SHARDED[name]) for name in SHARDED}


def _trajectory(
    rank: int, strategy: str, world_size: int, dtype: torch.dtype, steps: int, make: Any, options: dict[str, Any]
) -> list[dict[str, Tensor]]:
    """Weights after the steps of CHECKED."""
    model, shapes = Model(MORE_SHAPES, dtype), MORE_SHAPES
    cuts = random_cuts(shapes, world_size) if strategy == "flat" else {}
    named: list[tuple[str, Any]] = list(model.named_parameters())
    if cuts:
        named = [(name, Parameter(p.detach().flatten()[slice(*cuts[name][rank])])) for name, p in named]
    elif strategy == "fsdp_last":
        mesh = init_device_mesh("cpu", (world_size,))
        even = {id(p) for _, p in named if p.ndim == 2 and p.shape[1] % world_size == 0}
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1 if id(p) in even else 0))
        named = list(model.named_parameters())
    else:
        shard(model, strategy, world_size, 0.5)
        named = list(model.named_parameters())
    last = [named.pop()]
    different = {"newton_schulz_steps": 3} if make is not Dion else {"momentum": 0.5}
    updater = make([{"params": named}, {"params": last, **different}], lr=0.01, **options)
    named += last
    if cuts:
        slices = {name: tuple(FlatSlice(shapes[name], *cut) for cut in cuts[name]) for name, _ in named}
        updater.declare_flat_parts({p: [FlatPart(name, 0, slices[name])] for name, p in named}, dist.group.WORLD)
    checked = []
    for step in range(1, steps + 1):
        for name, gradient in gradients(step, shapes, dtype).items():
            parameter = dict(named)[name]
            if cuts:
                gradient = gradient.flatten()[slice(*cuts[name][rank])]
            parameter.grad = placed_as(parameter, gradient)
        updater.step()
        if step in CHECKED:
            checked.append({name: joined(p, shapes[name]) if cuts else full(p) for name, p in named})
    return checked


@cache
def _one_process(dtype: torch.dtype) -> dict[str, list[dict[str, Tensor]]]:
    return _trajectories(0, "ddp", 1, dtype, CHECKED[-1])


LAYOUTS = [("ddp", 2), ("fsdp_rows", 4), ("fsdp_last", 2), ("hsdp", 4), ("flat", 3)]
MORE_LAYOUTS = [("ddp", 3), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("fsdp_rows", 2), ("fsdp_rows", 3), ("hsdp", 2)]
MORE_LAYOUTS += [("fsdp_last", 4), ("flat", 2), ("flat", 4), ("ddp", 8), ("fsdp_rows", 8), ("flat", 8)]


@supports("exact", optimizer="Muon")
@supports("exact", optimizer="Dion")
@supports("exact", optimizer="Dion3")
@pytest.mark.parametrize(
    ("strategy", "world_size", "dtype", "steps"),
    [
        *((*layout, torch.float64, 4) for layout in LAYOUTS),
        *(
            pytest.param(*layout, dtype, 20, marks=pytest.mark.slow)
            for layout in LAYOUTS + MORE_LAYOUTS
            for dtype in (torch.float64, torch.float32)
        ),
    ],
)
def test_sharded_trajectories_equal_one_process(strategy: str, world_size: int, dtype: torch.dtype, steps: int) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for found in run_on_ranks(world_size, _trajectories, strategy, world_size, dtype, steps):
        for name, expected in _one_process(dtype).items():
            for step, weights, of_one in zip(CHECKED, found[name], expected, strict=False):
                for parameter in of_one:
                    torch.testing.assert_close(
                        weights[parameter],
                        of_one[parameter],
                        rtol=0,
                        atol=tolerance,
                        msg=f"{name}, {parameter}, step {step}",
                    )


def _count_rows(matrices: Tensor) -> Tensor:
    """Sees all rows: adds to each element how many rows there are in its matrix, and the sum of its column."""
    return matrices + matrices.shape[1] + matrices.sum(dim=1, keepdim=True)


def _on_owners_of_random_cuts(rank: int, world_size: int) -> None:
    """Two flat matrices of one shape and a third, cut anywhere, by random seeds."""
    generator = random.Random(world_size)
    group = dist.group.WORLD
    for _ in range(40):
        shapes = [(generator.randint(1, 7), generator.randint(1, 6)) for _ in range(2)]
        tasks, expected = [], []
        for shape in (*shapes, shapes[0]):
            size = shape[0] * shape[1]
            borders = [0, *sorted(generator.randint(0, size) for _ in range(world_size - 1)), size]
            form = tall_form(shape, generator.choice(["right", "left"]), 1.0)
            layout = flat_layout(form, [FlatSlice(shape, *cut) for cut in pairwise(borders)], rank, group)
            values = torch.tensor([[generator.random() for _ in range(form.n)] for _ in range(form.rows)])
            tasks.append(Task(_ask_owner(values[layout.start : layout.stop]), layout))
            expected.append(_count_rows(values[None])[0, layout.start : layout.stop])
        for found, wanted in zip(finish(run_rounds(tasks)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def _ask_owner(rows: Tensor) -> Any:
    return (yield OnOwner(rows, _count_rows))


@pytest.mark.parametrize("world_size", [1, 3])
def test_owners_see_every_row_once_and_return_each_to_all_that_hold_it(world_size: int) -> None:
    """Torn rows are held twice or more, some ranks hold nothing."""
    run_on_ranks(world_size, _on_owners_of_random_cuts, world_size)
