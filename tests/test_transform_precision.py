"""`transform_precision="bf16"`: operands of products are rounded to bfloat16, sums and results are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from processes import run_on_ranks
from references import ReferenceDCTAdamW, ReferenceTrion, newton_schulz, select
from sharded_models import OPERANDS
from test_sharded_trajectories import assert_same_indices, assert_same_weights, one_process, trajectory
from torch import Tensor
from torch import library as registry
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from trajectories import KINDS, SHAPES, assert_equals_references, both, feed, make, make_gradients, make_parameters

from dist_lowrank.config import ConfigError, compose, digest
from dist_lowrank.dictionaries import Dictionary, columns
from dist_lowrank.kernels import narrow_products
from dist_lowrank.optim import DCTAdamW, Fira
from dist_lowrank.optim.gradient_sync import sum_coefficients

BF16 = torch.bfloat16
NARROW = {"transform_precision": "bf16"}


def rounded(values: Tensor) -> Tensor:
    return values.bfloat16().double()


# Products ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu() -> Iterator[None]:
    """Takes the route of a GPU, whose two operators a CPU lacks: here they are what torch documents of them."""

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        return left.to(out_dtype) @ right.to(out_dtype)

    def addmm(
        into: Tensor,
        left: Tensor,
        right: Tensor,
        out_dtype: torch.dtype,
        *,
        beta: float = 1,
        alpha: float = 1,
        out: Tensor,
    ) -> Tensor:
        assert out is into
        assert out.dtype == out_dtype
        return out.addmm_(left.to(out_dtype), right.to(out_dtype), beta=beta, alpha=alpha)

    with (
        registry._scoped_library("aten", "IMPL") as library,
        mock.patch.object(narrow_products, "_WIDE_SUMS", ("cpu",)),
    ):
        library.impl("mm.dtype", mm, "CPU")
        library.impl("addmm.dtype_out", addmm, "CPU")
        yield


def _check_products(device: str = "cpu") -> None:
    generator = torch.Generator(device).manual_seed(0)
    for rows, n, rank in ((70, 40, 9), (1, 16, 16), (0, 8, 3), (33, 7, 1)):
        D, indices = rounded(columns("dct2", n, device=device)), torch.arange(n - rank, n, device=device)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            dictionary = Dictionary("dct2", n, dtype=dtype, device=torch.device(device), precision="bf16")
            assert dictionary.storage_bytes == 2 * n * n
            matrix = torch.randn(n, rows, generator=generator, dtype=dtype, device=device).t()
            coefficients = torch.randn(rows, rank, generator=generator, dtype=dtype, device=device)
            lifted = 0.9 * matrix.double() - 0.1 * rounded(coefficients) @ D[:, indices].t()
            for target in (matrix.clone(), matrix.contiguous()):  # also with the strides of the left side
                dictionary.add_lifted(target, coefficients, indices, decay=0.9, scale=-0.1)
                torch.testing.assert_close(target.double(), lifted, rtol=0, atol=tolerance)
            found = (dictionary.transform(matrix), dictionary.project(matrix, indices))
            for each, expected in zip(found, (rounded(matrix) @ D, rounded(matrix) @ D[:, indices]), strict=True):
                assert each.dtype == dtype
                torch.testing.assert_close(each.double(), expected, rtol=0, atol=tolerance)
        # Weights of bfloat16 are rounded once: never further off than half of their last place.
        narrow = matrix.bfloat16()
        lifted = 0.9 * narrow.double() - 0.1 * rounded(coefficients) @ D[:, indices].t()
        dictionary.add_lifted(narrow, coefficients, indices, decay=0.9, scale=-0.1)
        assert ((narrow.double() - lifted).abs() <= 2.0**-8 * lifted.abs() * 1.0001 + 1e-6).all()


@pytest.mark.parametrize("block_elements", [2**20, 200])
def test_operands_alone_are_rounded(block_elements: int) -> None:
    with mock.patch.object(narrow_products, "BLOCK_ELEMENTS", block_elements):
        _check_products()


def test_operands_alone_are_rounded_by_what_a_gpu_is_asked_for(as_on_a_gpu: None) -> None:
    _check_products()


@pytest.mark.gpu
def test_operands_alone_are_rounded_on_a_gpu() -> None:
    _check_products("cuda")


# Steps ---------------------------------------------------------------------------------------------------------------


class RoundedDCTAdamW(ReferenceDCTAdamW):
    def step(self, gradient: Tensor) -> None:
        self.t += 1
        coordinates = rounded(self.tall(gradient)) @ rounded(self.D)
        if self.t == 1 or self.t % self.refresh_interval == 0:
            previous, self.indices = self.basis, select(coordinates, self.r, self.ranking)
            self.basis = self.D[:, self.indices]  # exact, so that moments move as a permutation
            self._carry_moments(previous)
        a = coordinates[:, self.indices]
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * a
        self.v = b2 * self.v + (1 - b2) * a * a
        u = (self.m / (1 - b1**self.t)) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)
        lifted = self.untall(rounded(u) @ rounded(self.basis).T)
        self.weight = (1 - self.lr * self.weight_decay) * self.weight - self.lr * lifted


class RoundedTrion(ReferenceTrion):
    def step(self, gradient: Tensor) -> None:
        self.M = self.M + rounded(self.tall(gradient)) @ rounded(self.D)  # in coordinates
        indices = select(self.M, self.r, self.ranking)
        b = self.M[:, indices].clone()
        self.M[:, indices] *= self.momentum
        lifted = self.untall(rounded(newton_schulz(b, self.newton_schulz_steps)) @ rounded(self.D[:, indices]).T)
        self.weight = (1 - self.lr * self.weight_decay) * self.weight - self.lr * self.scale * lifted


@both
def test_steps_are_those_of_rounded_operands(kind: str) -> None:
    parameters = make_parameters(SHAPES)
    reference: Any = {"dct_adamw": RoundedDCTAdamW, "trion": RoundedTrion}[kind]
    references = [reference(parameter, **KINDS[kind][2]) for parameter in parameters]
    assert_equals_references(make(kind, parameters, **NARROW), parameters, references, steps=12)


@both
def test_weights_of_bf16_are_those_of_fp32_rounded_after_each_step(kind: str) -> None:
    narrow, wide = make_parameters(SHAPES, BF16), make_parameters(SHAPES, BF16)
    wide = [Parameter(each.detach().float()) for each in wide]
    optimizers = [make(kind, each, **NARROW) for each in (narrow, wide)]
    for gradients in make_gradients(SHAPES, 6):
        for optimizer, parameters in zip(optimizers, (narrow, wide), strict=True):
            feed(optimizer, parameters, [each.bfloat16() for each in gradients])
        for left, right in zip(narrow, wide, strict=True):
            right.data.copy_(right.data.bfloat16())
            assert torch.equal(left.detach().float(), right.detach())


class Made(TorchDispatchMode):
    """The dtypes of all tensors of so many elements that operators made."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.dtypes = elements, set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor) and each.numel() == self.elements and not each._is_view():
                self.dtypes.add(each.dtype)
        return result


@pytest.mark.parametrize("shape", [(96, 32), (32, 96)], ids=["right", "left"])
def test_nothing_of_the_size_of_a_bf16_gradient_is_made_in_fp32(shape: tuple[int, int]) -> None:
    """As a GPU does it (`meta` takes its route): in an ordinary step; at a refresh there are coordinates."""

    def made(refresh_interval: int, **options: Any) -> set[torch.dtype]:
        parameter = Parameter(torch.empty(shape, dtype=BF16, device="meta"))
        parameter.grad = torch.empty_like(parameter)
        optimizer = DCTAdamW([parameter], rank=4, refresh_interval=refresh_interval, **options)
        optimizer.step()
        with Made(96 * 32) as watch:
            optimizer.step()
        return watch.dtypes

    assert torch.float32 not in made(100, **NARROW)
    assert torch.float32 in made(100), "the watch sees the copies where there are some"
    assert torch.float32 in made(1, **NARROW)


@pytest.mark.parametrize("optimizer", OPERANDS)
def test_sharded_trajectories_equal_one_process(optimizer: str) -> None:
    weights, indices = one_process(optimizer, torch.float64)
    for strategy, world_size in (("ddp", 2), ("fsdp", 4), ("flat", 3)):
        for found in run_on_ranks(world_size, trajectory, strategy, world_size, optimizer, torch.float64):
            assert_same_indices(found[1], indices)
            assert_same_weights(found[0], weights, 1e-10)


# Options -------------------------------------------------------------------------------------------------------------


def test_it_is_refused_where_there_is_no_fixed_dictionary() -> None:
    with pytest.raises(
        ValueError, match="transform_precision: 'bf16' is not allowed; allowed: fp32 with subspace='svd'"
    ):
        Fira(make_parameters([(8, 6)]), **NARROW)
    Fira(make_parameters([(8, 6)]), subspace="dct2", **NARROW)
    with pytest.raises(ConfigError, match=r"strategy\.low_rank_gradients: true is not .* optimizer\.transform_pr"):
        compose(
            [
                "strategy=ddp",
                "strategy.low_rank_gradients=true",
                "optimizer.refresh_interval=5",
                "optimizer.transform_precision=bf16",
            ]
        )
    optimizer = DCTAdamW(make_parameters([(8, 6)]), refresh_interval=5, **NARROW)
    with pytest.raises(ValueError, match=r"low_rank_gradients: .*transform_precision='bf16'"):
        sum_coefficients(None, optimizer)


def test_it_is_a_key_of_the_configuration_that_changes_the_science() -> None:
    config = compose(["optimizer.transform_precision=bf16"])
    assert config.optimizer.transform_precision == "bf16"
    assert digest(config) != digest(compose([]))
    with pytest.raises(
        ConfigError, match=r"optimizer\.transform_precision: fp16 is not allowed; .*allowed: fp32, bf16"
    ):
        compose(["optimizer=trion", "optimizer.transform_precision=fp16"])
