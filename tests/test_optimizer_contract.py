"""Optimizers behave as users of torch.optim expect: groups, missing gradients, closures, schedulers, isolation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from references import initial_weight, prescribed_gradients
from torch import Tensor
from torch.nn import Parameter
from trajectories import (
    MIXED_SHAPES,
    assert_bitwise_equal,
    assert_equals_references,
    both,
    each,
    feed,
    make,
    make_gradients,
    make_parameters,
    references_of,
    tensors_of,
    train,
)

from dist_lowrank.optim import Trion

# Groups and names


@both
def test_every_option_can_differ_per_group(kind: str) -> None:
    options: list[dict[str, Any]] = [
        {"rank": 2, "dictionary": "dct3", "side": "left"},
        {"lr": 0.1, "weight_decay": 0.0, "rank": 0.5, "ranking": "l1"},
        {"betas": (0.5, 0.8), "transition": "reset", "eps": 1e-3, "refresh_interval": 3, "column_bias_correction": True}
        if kind == "dct_adamw"
        else {"momentum": 0.5, "scale": "none", "newton_schulz_steps": 2, "side": "longer"},
    ]
    parameters = make_parameters([(8, 6), (4, 10), (9, 9)])
    optimizer = make(kind, [{"params": [p], **o} for p, o in zip(parameters, options, strict=True)])
    references = [references_of(kind, [p], **o)[0] for p, o in zip(parameters, options, strict=True)]
    assert_equals_references(optimizer, parameters, references)


@both
def test_tensors_named_tensors_and_groups_of_both_give_the_same_trajectory(kind: str) -> None:
    results = []
    for style in ("tensors", "generator", "named", "groups", "named groups"):
        parameters = make_parameters(MIXED_SHAPES)
        named = [(f"layer.{i}", p) for i, p in enumerate(parameters)]
        optimizer = make(
            kind,
            {
                "tensors": parameters,
                "generator": iter(parameters),
                "named": named,
                "groups": [{"params": parameters[:2]}, {"params": parameters[2:]}],
                "named groups": [{"params": named[:2]}, {"params": named[2:]}],
            }[style],
        )
        train(optimizer, parameters, steps=5)
        results.append([p.detach() for p in parameters])
        names = [name for group in optimizer.state_dict()["param_groups"] for name in group.get("param_names", [])]
        assert names == ([name for name, _ in named] if style.startswith("named") else [])
    for result in results[1:]:
        assert_bitwise_equal(result, results[0])


@both
def test_a_group_added_later_starts_its_own_step_count(kind: str) -> None:
    first, second = make_parameters([(8, 6), (6, 8)])
    references = references_of(kind, [first, second])
    optimizer = make(kind, [first])
    train(optimizer, [first], steps=5)
    optimizer.add_param_group({"params": [second], "lr": 0.05})
    references[1].lr = 0.05
    early = prescribed_gradients((8, 6), 5)
    for gradient in early:
        references[0].step(gradient)
    assert_equals_references(optimizer, [first, second], references)


# Missing gradients


@both
def test_parameters_without_a_gradient_are_left_alone_and_count_no_step(kind: str) -> None:
    parameters = make_parameters([(8, 6), (6, 8), (7, 7)])
    references = references_of(kind, parameters)
    present = [[True, False, True], [True, True, False], [False, True, True], [True, True, True], [True, False, True]]
    optimizer = make(kind, parameters)
    for gradients, here in zip(make_gradients([(8, 6), (6, 8), (7, 7)], 5), present, strict=True):
        feed(optimizer, parameters, [g if h else None for g, h in zip(gradients, here, strict=True)])
        for parameter, reference, gradient, h in zip(parameters, references, gradients, here, strict=True):
            if h:
                reference.step(gradient)
            torch.testing.assert_close(parameter.detach(), reference.weight, rtol=0, atol=1e-10)


@both
def test_a_step_without_any_gradient_changes_nothing(kind: str) -> None:
    parameters = make_parameters(MIXED_SHAPES)
    before = [p.detach().clone() for p in parameters]
    optimizer = make(kind, parameters)
    feed(optimizer, parameters, [None] * len(MIXED_SHAPES))
    assert_bitwise_equal([p.detach() for p in parameters], before)
    references = references_of(kind, parameters[:2])
    for parameter in parameters[2:]:
        parameter.requires_grad_(False)
    feed_only = parameters[:2]
    assert_equals_references(optimizer, feed_only, references)


@each
def test_frozen_parameters_stay_as_they_are(kind: str) -> None:
    parameters = make_parameters(MIXED_SHAPES)
    frozen = [parameters[0], parameters[2]]
    before = [p.detach().clone() for p in frozen]
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = make(kind, parameters)
    for gradients in make_gradients(MIXED_SHAPES, 3):
        feed(
            optimizer, parameters, [g if p.requires_grad else None for p, g in zip(parameters, gradients, strict=True)]
        )
    assert_bitwise_equal([p.detach() for p in frozen], before)
    assert not torch.equal(parameters[1].detach(), initial_weight(MIXED_SHAPES[1], seed=1))


# Gradients, closures, schedulers, scalers


@each
def test_step_never_changes_a_gradient(kind: str) -> None:
    parameters = make_parameters(MIXED_SHAPES, torch.float32)
    optimizer = make(kind, parameters)
    for gradients in make_gradients(MIXED_SHAPES, 3):
        kept = [g.float() for g in gradients]
        feed(optimizer, parameters, gradients)
        assert_bitwise_equal([p.grad for p in parameters], kept)


@each
def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned(kind: str) -> None:
    parameters, others = make_parameters([(8, 6), (6,)]), make_parameters([(8, 6), (6,)])
    with_closure, without = make(kind, parameters), make(kind, others)

    def loss_of(of: list[Parameter]) -> Tensor:
        return (of[0] @ of[1]).square().sum()

    for _ in range(3):

        def closure() -> Tensor:
            with_closure.zero_grad()
            loss = loss_of(parameters)
            loss.backward()
            return loss

        returned = with_closure.step(closure)
        without.zero_grad()
        expected = loss_of(others)
        expected.backward()
        assert without.step() is None
        torch.testing.assert_close(returned, expected, rtol=0, atol=0)
    assert_bitwise_equal([p.detach() for p in parameters], [p.detach() for p in others])


@each
def test_zero_grad_clears_gradients_only(kind: str) -> None:
    parameters = make_parameters(MIXED_SHAPES)
    optimizer = make(kind, parameters)
    train(optimizer, parameters, steps=2)
    before = copy.deepcopy(tensors_of(optimizer.state_dict()))
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in parameters)
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)
    after = tensors_of(optimizer.state_dict())
    assert_bitwise_equal(list(after.values()), list(before.values()))


@both
def test_a_learning_rate_scheduler_sets_the_rate_of_the_next_step(kind: str) -> None:
    parameters = make_parameters([(8, 6), (4, 10)])
    references = references_of(kind, parameters)
    optimizer = make(kind, parameters)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) / 10 if t < 9 else 0.97**t)
    for gradients in make_gradients([(8, 6), (4, 10)], 20):
        lr = scheduler.get_last_lr()[0]
        feed(optimizer, parameters, gradients)
        scheduler.step()
        for parameter, reference, gradient in zip(parameters, references, gradients, strict=True):
            reference.lr = lr
            reference.step(gradient)
            torch.testing.assert_close(parameter.detach(), reference.weight, rtol=0, atol=1e-10)


def test_the_dense_rate_of_trion_follows_the_schedule_in_proportion() -> None:
    ours, theirs = make_parameters([(6,)]), make_parameters([(6,)])
    optimizer = Trion(ours, lr=0.5, dense_lr=0.02)
    reference = torch.optim.AdamW(theirs, lr=0.02, betas=(0.9, 0.95), weight_decay=0.01)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: (t + 1) / 10) for o in (optimizer, reference)]
    for gradients in make_gradients([(6,)], 20):
        feed(optimizer, ours, gradients)
        feed(reference, theirs, gradients)
        for scheduler in schedulers:
            scheduler.step()
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-12)


@each
def test_the_learning_rate_may_be_a_tensor(kind: str) -> None:
    parameters, others = make_parameters(MIXED_SHAPES), make_parameters(MIXED_SHAPES)
    train(make(kind, parameters, lr=torch.tensor(2.0**-6)), parameters, steps=3)
    train(make(kind, others, lr=2.0**-6), others, steps=3)
    assert_bitwise_equal([p.detach() for p in parameters], [p.detach() for p in others])


@each
def test_a_step_that_the_gradient_scaler_skips_leaves_weights_and_step_count(kind: str) -> None:
    parameters = make_parameters([(8, 6), (6,)], torch.float32)
    optimizer = make(kind, parameters)
    train(optimizer, parameters, steps=2)
    weights = [p.detach().clone() for p in parameters]
    before = copy.deepcopy(tensors_of(optimizer.state_dict()))
    scaler = torch.amp.GradScaler("cpu")
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((parameters[0] @ parameters[1]).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor != 1.0:
            assert_bitwise_equal([p.detach() for p in parameters], weights)
            assert_bitwise_equal(list(tensors_of(optimizer.state_dict()).values()), list(before.values()))
    assert not torch.equal(parameters[0].detach(), weights[0])
    assert all(float(optimizer.state[p]["step"]) == 3 for p in parameters)


# Determinism and isolation


@both
def test_the_same_run_twice_is_bitwise_equal_and_leaves_the_users_random_state(kind: str) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        parameters = make_parameters(MIXED_SHAPES, torch.float32)
        train(make(kind, parameters, dictionary="random", seed=9), parameters, steps=5)
        assert torch.equal(before, torch.random.get_rng_state())
        results.append([p.detach() for p in parameters])
    assert_bitwise_equal(*results)


@each
def test_cutting_the_work_in_waves_changes_nothing(kind: str) -> None:
    results = []
    for workspace_bytes in (1, 2**30):
        parameters = make_parameters([(8, 6), (4, 10), (9, 9)], torch.float32)
        train(make(kind, parameters, workspace_bytes=workspace_bytes), parameters, steps=5)
        results.append([p.detach() for p in parameters])
    assert_bitwise_equal(*results)


@both
def test_two_optimizers_in_one_process_do_not_touch_each_other(kind: str) -> None:
    first, second, alone = (make_parameters([(8, 6), (4, 10)]) for _ in range(3))
    of_first, of_second, of_alone = make(kind, first), make(kind, second, dictionary="dct3", rank=1), make(kind, alone)
    for gradients in make_gradients([(8, 6), (4, 10)], 5):
        feed(of_first, first, gradients)
        feed(of_second, second, gradients)
    train(of_alone, alone, steps=5)
    assert_bitwise_equal([p.detach() for p in first], [p.detach() for p in alone])
