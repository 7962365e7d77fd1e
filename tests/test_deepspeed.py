"""Real DeepSpeed, ZeRO stages 0 to 3: the one-process trajectory, or a refusal; never something else."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from collectives import CountCollectives
from deepspeed_runs import (
    KINDS,
    OTHERS,
    SHAPES,
    Model,
    configuration,
    feed,
    gradients_of,
    make_optimizer,
    start,
    start_bound,
    vocabulary_groups,
    weights_of,
)
from processes import run_on_ranks
from support_matrix import supports
from torch import Tensor

from dist_lowrank.optim import DCTAdamW, param_groups
from dist_lowrank.sharding.layouts import local
from dist_lowrank.strategies.deepspeed import bind

STEPS = 20


@cache
def one_process(kind: str, steps: int = STEPS, clip: float = 0.0, groups: Any = param_groups) -> dict[str, Tensor]:
    """Where our optimizer takes the model without DeepSpeed, which other tests compare with the references."""
    model = Model()
    optimizer = make_optimizer(kind, groups(model))
    for gradients in gradients_of(steps):
        for module, gradient in zip(model.weights.values(), gradients, strict=True):
            module.weight.grad = gradient.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {name: module.weight.detach() for name, module in model.weights.items()}


def _trajectory(rank: int, config: dict[str, Any], kind: str, steps: int = STEPS) -> dict[str, Any]:
    engine = start_bound(config, kind)
    for gradients in gradients_of(steps):
        feed(engine, gradients)
    return {"weights": weights_of(engine), "layout": layout_of(engine)}


def layout_of(engine: Any) -> dict[str, Any]:
    """Which elements of which matrix this rank has, and how much padding."""
    runs, padding = {}, 0
    for tensor, place in engine.basic_optimizer._flat.items():
        own = {part.name: part.slices[place.group.rank()] for part in place.parts}
        runs |= {name: (run.start, run.stop) for name, run in own.items()}
        padding += tensor.numel() - sum(run.stop - run.start for run in own.values())
    return {"runs": runs, "padding": padding}


def assert_cut_badly(layouts: list[dict[str, Any]]) -> None:
    """A matrix is cut inside a row, a rank holds nothing of a matrix, and there is padding."""
    matrices = {f"weights.{name}.weight": shape for name, shape in SHAPES.items() if len(shape) == 2}
    runs = [(name, *layout["runs"][name]) for layout in layouts for name in matrices]
    assert any(0 < begin < end and begin % matrices[name][1] for name, begin, end in runs)
    assert any(begin == end for _, begin, end in runs)
    assert any(layout["padding"] for layout in layouts)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name].to(weight.dtype), atol=tolerance, rtol=0, msg=name)


STRATEGIES = ("zero0", "zero1", "zero2", "zero3")
QUICK = [("dct_adamw_error_feedback", 2), ("dct_adamw", 3), ("trion", 4)]
QUICK_CASES = {(strategy, *case) for strategy in STRATEGIES for case in QUICK}
QUICK_CASES |= {("zero2", "dion3", 2), ("zero2", "dion", 3), ("zero3", "muon", 3)}


@supports("exact")
@pytest.mark.parametrize(
    ("strategy", "kind", "world_size"),
    [
        pytest.param(*case, marks=[] if case in QUICK_CASES else pytest.mark.slow)
        for case in product(STRATEGIES, KINDS, (1, 2, 3, 4))
    ],
)
def test_zero_follows_the_one_process_trajectory(strategy: str, world_size: int, kind: str) -> None:
    stage = int(strategy[-1])
    results = run_on_ranks(world_size, _trajectory, configuration(stage), kind)
    for result in results:
        assert_same(result["weights"], one_process(kind))
    if stage > 0 and world_size > 1:
        assert_cut_badly([result["layout"] for result in results])


def _without_a_subspace(rank: int, stage: int) -> dict[str, dict[str, Tensor]]:
    """All of them in one group of processes."""
    found = {}
    for kind in OTHERS:
        engine = start_bound(configuration(stage), kind, groups=vocabulary_groups)
        for gradients in gradients_of(STEPS):
            feed(engine, gradients)
        found[kind] = weights_of(engine)
    return found


@cache
def without_a_subspace(stage: int, world_size: int) -> list[dict[str, dict[str, Tensor]]]:
    return run_on_ranks(world_size, _without_a_subspace, stage, timeout_seconds=120)


@supports("exact")
@pytest.mark.parametrize("optimizer", OTHERS)
@pytest.mark.parametrize(
    "strategy", ["zero2", *(pytest.param(f"zero{stage}", marks=pytest.mark.slow) for stage in (0, 1, 3))]
)
def test_optimizers_without_a_subspace_follow_their_one_process_trajectory(strategy: str, optimizer: str) -> None:
    expected = one_process(optimizer, groups=vocabulary_groups)
    for found in without_a_subspace(int(strategy[-1]), 3):
        assert_same(found[optimizer], expected)


# Variants of the layout. Each says what it is (a stage, DeepSpeed's settings) and on how many ranks.
VARIANTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "round_robin_1": (1, {"zero": {"round_robin_gradients": True}}, 3),
    "round_robin_2": (2, {"zero": {"round_robin_gradients": True}}, 2),
    "aligned_1": (1, {"zero": {"parameter_alignment": True}}, 2),
    "aligned_2_round_robin": (2, {"zero": {"parameter_alignment": True, "round_robin_gradients": True}}, 3),
    "sub_groups": (3, {"zero": {"sub_group_size": 20}}, 2),
    "partitioned": (3, {"zero": {"stage3_param_persistence_threshold": 0}}, 2),
    "offload_1": (1, {"zero": {"offload_optimizer": {"device": "cpu"}}}, 2),
    "offload_2": (2, {"zero": {"offload_optimizer": {"device": "cpu"}}}, 2),
    "offload_3": (3, {"zero": {"offload_optimizer": {"device": "cpu"}}}, 2),
    "accumulation_0": (0, {"accumulate": 3}, 2),
    "accumulation_1": (1, {"accumulate": 3}, 2),
    "accumulation_2": (2, {"accumulate": 3}, 2),
    "accumulation_3": (3, {"accumulate": 3}, 2),
}


QUICK_VARIANTS = (
    "round_robin_2",
    "aligned_2_round_robin",
    "sub_groups",
    "offload_2",
    "accumulation_1",
    "accumulation_3",
)


@pytest.mark.parametrize(
    "variant", [pytest.param(each, marks=() if each in QUICK_VARIANTS else pytest.mark.slow) for each in VARIANTS]
)
def test_variants_of_the_layout_follow_the_same_trajectory(variant: str) -> None:
    stage, settings, world_size = VARIANTS[variant]
    for result in run_on_ranks(world_size, _trajectory, configuration(stage, **settings), "dct_adamw"):
        assert_same(result["weights"], one_process("dct_adamw"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_raw_gradient_is_clipped_as_torch_clips_it(stage: int) -> None:
    expected = one_process("dct_adamw_error_feedback", clip=5.0)
    assert not torch.allclose(expected["tall"], one_process("dct_adamw_error_feedback")["tall"], atol=1e-3)  # it bites
    for result in run_on_ranks(2, _trajectory, configuration(stage, gradient_clipping=5.0), "dct_adamw_error_feedback"):
        assert_same(result["weights"], expected)


GROUPS = (
    ({"rank": 2}, ("wide", "square")),
    ({"low_rank": False, "lr": 0.03}, ("bias", "kernel")),
    ({"rank": 0.5, "lr": 0.01}, ("low", "dot", "tall")),
)


def _groups(model: Model) -> list[dict[str, Any]]:
    """Three groups in an order other than the model's."""
    return [
        {"params": [(name, model.weights[name].weight) for name in members], **options} for options, members in GROUPS
    ]


def _several_groups(rank: int, config: dict[str, Any]) -> dict[str, Tensor]:
    engine = start_bound(config, groups=_groups)
    for gradients in gradients_of(STEPS):
        feed(engine, gradients)
    return weights_of(engine)


@pytest.mark.parametrize(("stage", "zero"), [(1, {}), (2, {"round_robin_gradients": True}), (3, {"sub_group_size": 9})])
def test_several_groups_keep_their_own_options(stage: int, zero: dict[str, Any]) -> None:
    model = Model()
    optimizer = make_optimizer("dct_adamw", _groups(model))
    for gradients in gradients_of(STEPS):
        for module, gradient in zip(model.weights.values(), gradients, strict=True):
            module.weight.grad = gradient.clone()
        optimizer.step()
    expected = {name: module.weight.detach() for name, module in model.weights.items()}
    for found in run_on_ranks(3, _several_groups, configuration(stage, zero=zero)):
        assert_same(found, expected)


# bf16: the optimizer's part is the same in fp32; weights and gradients are bf16 on the way there and back.
BF16 = {
    "stage_0": (0, {}, "FP16_UnfusedOptimizer"),
    "stage_1": (1, {"data_types": {"grad_accum_dtype": "bf16"}}, "DeepSpeedZeroOptimizer"),
    "stage_1_fp32_accumulation": (1, {"data_types": {"grad_accum_dtype": "fp32"}}, "BF16_Optimizer"),
    "stage_2": (2, {}, "DeepSpeedZeroOptimizer"),
    "stage_2_fp32_accumulation": (2, {"data_types": {"grad_accum_dtype": "fp32"}}, "DeepSpeedZeroOptimizer"),
    "stage_3": (3, {}, "DeepSpeedZeroOptimizer_Stage3"),
}


@cache
def one_process_in_bf16(kind: str) -> dict[str, Tensor]:
    """Fp32 weights that begin as bf16 ones, and gradients rounded to bf16."""
    model = Model().bfloat16().float()
    optimizer = make_optimizer(kind, param_groups(model))
    for gradients in gradients_of(STEPS):
        for module, gradient in zip(model.weights.values(), gradients, strict=True):
            module.weight.grad = gradient.bfloat16().float()
        optimizer.step()
    return {name: module.weight.detach() for name, module in model.weights.items()}


def _bf16(rank: int, config: dict[str, Any], wrapper: str) -> dict[str, Tensor]:
    engine = start_bound(config, "trion")
    assert type(engine.optimizer).__name__ == wrapper
    for gradients in gradients_of(STEPS):
        feed(engine, gradients)
    return weights_of(engine)


@pytest.mark.parametrize("variant", BF16)
def test_bf16_trains_fp32_master_weights(variant: str) -> None:
    stage, settings, wrapper = BF16[variant]
    for found in run_on_ranks(2, _bf16, configuration(stage, bf16=True, **settings), wrapper):
        for name, weight in found.items():
            assert weight.dtype == torch.bfloat16
            expected = one_process_in_bf16("trion")[name]
            torch.testing.assert_close(weight, expected.bfloat16(), rtol=2**-7, atol=1e-5, msg=name)


# Steps that must change nothing ---------------------------------------------------------------------------------------


def _snapshot(engine: Any) -> list[Tensor]:
    optimizer = engine.basic_optimizer
    tensors = [value for state in optimizer._state.values() for value in state.values()]
    # Bits, because DeepSpeed leaves padding as it finds memory, NaN too.
    found = [*tensors, *optimizer._state, *weights_of(engine).values()]
    return [local(tensor).detach().clone().reshape(-1).view(torch.uint8) for tensor in found]


def _overflow(rank: int, config: dict[str, Any]) -> int:
    engine = start_bound(config, "dct_adamw_error_feedback")
    good = gradients_of(3)
    feed(engine, good[0])
    before = _snapshot(engine)
    bad = [gradient.clone() for gradient in good[1]]
    if rank == 1:
        bad[3].view(-1)[17] = torch.inf
    feed(engine, bad)
    for left, right in zip(before, _snapshot(engine), strict=True):
        assert torch.equal(left, right)
    assert not engine.was_step_applied()
    feed(engine, good[2])
    assert any(not torch.equal(left, right) for left, right in zip(before, _snapshot(engine), strict=True))
    return int(engine.skipped_steps)


@pytest.mark.parametrize(
    ("stage", "bf16", "more"),
    [
        (0, True, {}),
        (1, True, {}),
        (1, True, {"data_types": {"grad_accum_dtype": "fp32"}}),
        (2, True, {}),
        (3, True, {}),
        (1, False, {}),
        (2, False, {}),
        (3, False, {}),
    ],
)
def test_an_infinite_gradient_on_one_rank_changes_no_bit_on_any(stage: int, bf16: bool, more: dict[str, Any]) -> None:
    assert run_on_ranks(2, _overflow, configuration(stage, bf16=bf16, **more)) == [1, 1]


def _initialize_only(rank: int, config: dict[str, Any]) -> None:
    model = Model()
    before = {name: module.weight.detach().bfloat16() for name, module in model.weights.items()}
    engine = start(config, model=model)
    assert not engine.basic_optimizer._state
    for name, weight in weights_of(engine).items():
        assert torch.equal(weight, before[name])
    bind(engine)
    for state in engine.basic_optimizer.state.values():
        for key, value in state.items():
            assert not value.any(), key


def test_the_step_that_deepspeed_makes_by_itself_changes_nothing() -> None:
    run_on_ranks(2, _initialize_only, configuration(0, bf16=True))


# What a step costs ----------------------------------------------------------------------------------------------------


def _count_collectives(rank: int, config: dict[str, Any], kind: str) -> list[list[str]]:
    """Of the calls of the optimizer's step within one training step."""
    engine = start_bound(config, kind)
    feed(engine, gradients_of(1)[0])
    step, calls = engine.basic_optimizer.step, []

    def counted() -> None:
        with CountCollectives() as counter:
            step()
        calls.append([name for name, _ in counter.calls])

    engine.basic_optimizer.step = counted
    feed(engine, gradients_of(2)[1])
    return calls


ROWS, SUM = "alltoall_base_", "allreduce_"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_exchanges_torn_rows_and_sums_once_and_left_sides_back(stage: int) -> None:
    """One group of matrices; the dense group costs nothing. With matrices on the left, what they get comes back."""
    for calls in run_on_ranks(2, _count_collectives, configuration(stage), "dct_adamw"):
        assert calls == [[ROWS, SUM, ROWS], []]
    for calls in run_on_ranks(2, _count_collectives, configuration(stage), "trion"):
        assert calls == [[ROWS, SUM, SUM, ROWS], []]


# Two matrices to a role, on both sides.
SHARING = {"q0": (7, 5), "wide0": (5, 6), "bias": (5,), "q1": (9, 5), "wide1": (5, 8)}
SHARED = {"lr": 0.02, "rank": 3, "dictionary": "shared", "dictionary_interval": 4, "refresh_interval": 2}


def _sharing(rank: int, stages: list[int], zero: dict[str, Any]) -> list[tuple[dict[str, Tensor], int]]:
    """By stage: weights after 10 steps, and the bytes of dictionaries."""
    found = []
    with mock.patch.dict(KINDS, {"dct_adamw": (DCTAdamW, SHARED)}):
        for stage in stages:
            engine = start_bound(configuration(stage, zero=zero), model=Model(SHARING))
            for gradients in gradients_of(10, SHARING):
                feed(engine, gradients)
            found.append((weights_of(engine), engine.basic_optimizer.memory_bytes()["shared_dictionary"]))
    return found


def test_dictionaries_are_shared_under_zero_as_on_one_process() -> None:
    model = Model(SHARING)
    optimizer = DCTAdamW(param_groups(model), **SHARED)
    for gradients in gradients_of(10, SHARING):
        for module, gradient in zip(model.weights.values(), gradients, strict=True):
            module.weight.grad = gradient.clone()
        optimizer.step()
    for results in run_on_ranks(2, _sharing, [0, 2, 3], {}):
        for weights, dictionary_bytes in results:
            assert_same(weights, {name: module.weight.detach() for name, module in model.weights.items()})
            assert dictionary_bytes == 2 * 5 * 5 * 4
    # Stage 3 steps with one sub-group after the other, so that each has dictionaries of its own.
    for results in run_on_ranks(2, _sharing, [3], {"sub_group_size": 40}):
        ((_, dictionary_bytes),) = results
        assert dictionary_bytes > 2 * 5 * 5 * 4
