"""What an adversary broke: layouts, options and files at the edges of what is supported."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_lowrank.optim import DCTAdamW, full_state_dict
from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.pieces import FlatPart


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _experts(rank: int, placement: Any) -> torch.Tensor:
    """One expert for two ranks, alone in its wave; a gradient that is still to be summed or cut."""
    weight, gradient = values(1, 6, 4), 1 + values(1, 6, 4).flip(1)
    if rank < 0:
        parameter = nn.Parameter(weight)
        parameter.grad = gradient
    else:
        mesh = init_device_mesh("cpu", (2,))
        parameter = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None))
        if isinstance(placement, Partial):
            parameter.grad = DTensor.from_local(gradient / 2, mesh, [placement])
        else:
            parameter.grad = distribute_tensor(gradient, mesh, [placement], src_data_rank=None)
    DCTAdamW([{"params": [("experts", parameter)], "higher_dims": "stack"}], rank=2).step()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


@pytest.mark.parametrize("placement", [Shard(0), Replicate(), Partial()], ids=str)
def test_a_wave_of_experts_that_a_rank_does_not_hold_passes_it_by(placement: Any) -> None:
    expected = _experts(-1, None)
    for found in run_on_ranks(2, _experts, placement):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def _flattened_and_split(rank: int) -> torch.Tensor:
    model = nn.ParameterDict({"w": nn.Parameter(values(7, 3, 2, 2))})
    gradient = values(7, 3, 2, 2).flip(0)
    if rank >= 0:
        fully_shard(model)
        gradient = distribute_tensor(gradient, model["w"].device_mesh, model["w"].placements, src_data_rank=None)
    optimizer = DCTAdamW([{"params": [("w", model["w"])], "higher_dims": "flatten", "split": [5, 2]}], rank=2)
    model["w"].grad = gradient
    optimizer.step()
    return (model["w"].full_tensor() if rank >= 0 else model["w"]).detach().clone()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_convolution_that_is_flattened_and_split_can_be_sharded_along_the_split_dimension(world_size: int) -> None:
    expected = _flattened_and_split(-1)
    for found in run_on_ranks(world_size, _flattened_and_split):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def _wide_experts(rank: int) -> torch.Tensor:
    model = nn.ParameterDict({"w": nn.Parameter(values(3, 150, 140))})
    fully_shard(model)
    optimizer = DCTAdamW([{"params": [("w", model["w"])], "higher_dims": "stack"}], rank=4)
    model["w"].grad = distribute_tensor(
        values(3, 150, 140), model["w"].device_mesh, model["w"].placements, src_data_rank=None
    )
    optimizer.step()
    full = full_state_dict(optimizer)
    optimizer.load_state_dict(full)
    return full["state"][0]["indices"]


def test_sharded_indices_of_16_bits_are_gathered_over_gloo() -> None:
    parameter = nn.Parameter(values(3, 150, 140))
    parameter.grad = values(3, 150, 140)
    optimizer = DCTAdamW([{"params": [("w", parameter)], "higher_dims": "stack"}], rank=4)
    optimizer.step()
    expected = optimizer.state[parameter]["indices"]
    assert expected.dtype == torch.int16
    for found in run_on_ranks(2, _wide_experts):
        assert found.dtype == torch.int16
        assert torch.equal(found, expected)


def _number_in_a_flat_tensor(rank: int) -> torch.Tensor:
    number = (FlatSlice((), 0, 1), FlatSlice((), 1, 1))
    nothing = (FlatSlice((0, 5), 0, 0),) * 2
    matrix = (FlatSlice((4, 4), 0, 9), FlatSlice((4, 4), 9, 16))
    held = 1 - rank  # elements of the number
    flat = nn.Parameter(torch.full((held + (9, 7)[rank],), 0.3, dtype=torch.bfloat16))
    optimizer = DCTAdamW([("flat", flat)], weight_rounding="stochastic", rank=2)
    parts = [FlatPart("number", 0, number), FlatPart("nothing", held, nothing), FlatPart("matrix", held, matrix)]
    optimizer.declare_flat_parts({flat: parts}, dist.group.WORLD)
    flat.grad = torch.ones_like(flat)
    for _ in range(5):
        optimizer.step()
    optimizer.load_state_dict(full_state_dict(optimizer))
    return flat.detach()[:held]


def test_a_number_in_a_flat_tensor_is_rounded_as_it_is_alone() -> None:
    number = nn.Parameter(torch.tensor(0.3, dtype=torch.bfloat16))
    optimizer = DCTAdamW([("number", number)], weight_rounding="stochastic")
    number.grad = torch.ones_like(number)
    for _ in range(5):
        optimizer.step()
    assert torch.equal(run_on_ranks(2, _number_in_a_flat_tensor)[0], number.detach().view(1))


def _unequal_over_two_mesh_dimensions(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2, 2))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate(), Replicate()]))
    optimizer = DCTAdamW([("w", parameter)], rank=2)
    if rank == 0:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


def test_a_gradient_missing_on_one_of_replicas_over_two_mesh_dimensions_stops_all_ranks() -> None:
    for message in run_on_ranks(4, _unequal_over_two_mesh_dimensions, timeout_seconds=20):
        assert "'w' has a gradient on some of the ranks" in message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("error_feedback", "fp32"),
        ("moment_dtype", torch.int8),
        ("column_bias_correction", True),
        ("split", [2, 2]),
        ("low_rank", False),
        ("higher_dims", "stack"),
        ("rank", 1),
    ],
)
def test_an_option_that_state_follows_is_refused_once_there_is_state(option: str, value: Any) -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = DCTAdamW([("w", parameter)], rank=2)
    parameter.grad = torch.ones(4, 4)
    optimizer.step()
    before = parameter.detach().clone()
    optimizer.param_groups[0][option] = value
    with pytest.raises(
        ValueError, match=rf"{option}: .* is not allowed after state was made with .*; allowed: the same"
    ):
        optimizer.step()
    assert optimizer.state[parameter]["step"] == 1
    assert torch.equal(parameter.detach(), before)


class _Spare(TorchDispatchMode):
    """Counts the copies and zeros that are made of tensors of one size."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.copies = elements, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        fresh = function in (torch.ops.aten.clone.default, torch.ops.aten.zeros_like.default)
        if fresh and result.numel() == self.elements:
            self.copies += 1
        return result


def test_a_gradient_that_is_not_contiguous_is_copied_once_for_all_matrices_of_a_stack() -> None:
    parameter = nn.Parameter(torch.ones(8, 6, 4))
    optimizer = DCTAdamW([{"params": [("w", parameter)], "higher_dims": "stack"}], rank=2)
    parameter.grad = torch.ones(8, 4, 6).transpose(1, 2)
    with _Spare(parameter.numel()) as spare:
        optimizer.step()
    assert spare.copies == 1


CUTS = (FlatSlice((4, 4), 0, 8), FlatSlice((4, 4), 8, 16))


def _flat(rank: int) -> tuple[nn.Parameter, DCTAdamW]:
    parameter = nn.Parameter(values(16)[8 * rank : 8 * rank + 8].clone())
    parameter.grad = values(16).flip(0)[8 * rank : 8 * rank + 8].clone()
    return parameter, DCTAdamW([("flat", parameter)], rank=2)


def _load_what_rank_0_saved(rank: int, gathered: bool) -> str:
    parameter, optimizer = _flat(rank)
    optimizer.declare_flat_parts({parameter: [FlatPart("m", 0, CUTS)]}, dist.group.WORLD)
    optimizer.step()
    file: list[Any] = [full_state_dict(optimizer) if gathered else optimizer.state_dict()]
    dist.broadcast_object_list(file)  # rank 0 wrote it, and all read it
    optimizer.load_state_dict(file[0])
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "went on"


def test_one_ranks_part_of_flat_state_is_not_taken_for_all_ranks() -> None:
    assert all("have loaded the same rows" in found for found in run_on_ranks(2, _load_what_rank_0_saved, False))
    assert run_on_ranks(2, _load_what_rank_0_saved, True) == ["went on", "went on"]


def _declared_late(rank: int, steps: int) -> str:
    parameter, optimizer = _flat(rank)
    optimizer.state_dict()  # makes state
    for _ in range(steps):
        optimizer.state[parameter]["exp_avg"].fill_(1.0)
    try:
        optimizer.declare_flat_parts({parameter: [FlatPart("m", 0, CUTS)]}, dist.group.WORLD)
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "went on"


def test_flat_parts_can_be_declared_until_there_is_something_to_lose() -> None:
    assert run_on_ranks(2, _declared_late, 0) == ["went on", "went on"]
    for message in run_on_ranks(2, _declared_late, 1):
        assert "flat parts ['m']: declared after steps; allowed: before the first step" in message


def _gap(rank: int) -> str:
    parameter, optimizer = _flat(rank)
    gap = (FlatSlice((16,), 0, 7), FlatSlice((16,), 8, 16))
    optimizer.declare_flat_parts({parameter: [FlatPart("bias", 0, gap)]}, dist.group.WORLD)
    with pytest.raises(ValueError, match="rank 1 starts at 8; allowed: 7") as caught:
        optimizer.bind()
    return str(caught.value)


def test_a_gap_between_slices_is_refused_on_the_dense_path_too() -> None:
    assert run_on_ranks(2, _gap)


def test_state_saved_before_an_option_existed_loads_with_the_optimizers_own() -> None:
    parameter = nn.Parameter(torch.ones(3, 6, 4))
    optimizer = DCTAdamW([{"params": [("w", parameter)], "higher_dims": "stack"}], rank=2)
    parameter.grad = values(3, 6, 4).float()
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"] = [{"params": [0], "lr": 0.5}]
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.param_groups[0]["higher_dims"] == "stack"
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["params"] == [parameter]


def test_sizes_of_a_split_are_the_same_in_a_list_and_in_a_tuple() -> None:
    def make(split: Any) -> DCTAdamW:
        return DCTAdamW([{"params": [("w", nn.Parameter(torch.ones(6, 4)))], "split": split}], rank=2)

    make([4, 2]).load_state_dict(make((4, 2)).state_dict())
    with pytest.raises(ValueError, match=r"split: .*\(2, 4\)"):
        make([4, 2]).load_state_dict(make((2, 4)).state_dict())


def _frozen_but_for_one_rank(rank: int) -> None:
    model = nn.ParameterDict({"w": nn.Parameter(values(8, 4)), "v": nn.Parameter(values(8, 4), requires_grad=False)})
    fully_shard(model)
    optimizer = DCTAdamW(list(model.items()), rank=2)
    model["w"].grad = torch.ones_like(model["w"])
    if rank == 1:
        model["v"].grad = torch.ones_like(model["v"])
    optimizer.step()


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="ranks bind different parameters, and gloo aborts on votes of unequal length")
def test_a_gradient_given_by_hand_to_a_frozen_parameter_on_one_rank_is_followed_on_all() -> None:
    run_on_ranks(2, _frozen_but_for_one_rank, timeout_seconds=10)


def _pickled(rank: int) -> int:
    parameter, optimizer = _flat(rank)
    optimizer.declare_flat_parts({parameter: [FlatPart("m", 0, CUTS)]}, dist.group.WORLD)
    return len(pickle.dumps(optimizer))


@pytest.mark.xfail(strict=True, reason="process groups cannot be pickled, and flat parts hold one")
def test_an_optimizer_with_flat_parts_can_be_pickled() -> None:
    run_on_ranks(2, _pickled)


def _torn_row(rank: int) -> None:
    parameter = nn.Parameter(values(4)[2 * rank : 2 * rank + 2].clone())
    part = FlatPart("w", 0, (FlatSlice((1, 4), 0, 2), FlatSlice((1, 4), 2, 4)))
    states = []
    for _ in range(2):
        optimizer = DCTAdamW([("w", parameter)], rank=1, side="right")
        optimizer.declare_flat_parts({parameter: [part]}, dist.group.WORLD)
        if states:
            optimizer.load_state_dict(states[0])
        parameter.grad = values(4)[2 * rank : 2 * rank + 2].clone()
        optimizer.step()
        states.append(full_state_dict(optimizer))


def test_ranks_that_have_the_same_torn_row_load_the_same_state() -> None:
    run_on_ranks(2, _torn_row)
