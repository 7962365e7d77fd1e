"""Every way to multiply by a dictionary gives the same numbers: matrix, FFT, scipy, columns made on the fly."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from itertools import cycle
from typing import Any
from unittest import mock

import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trajectories import (
    SHAPES_FOR_HADAMARD,
    assert_equals_references,
    both,
    feed,
    make,
    make_gradients,
    make_parameters,
    references_of,
)

from dist_lowrank import dictionaries, fast_transforms
from dist_lowrank.dictionaries import Dictionary, DictionaryCache, columns
from dist_lowrank.fast_transforms import FAST_TRANSFORMS, FastTransform

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SIZES = [1, 2, 3, 4, 7, 8, 12, 64, 65, 97, 100, 257, 1000]  # one, odd, even, prime, powers of two
WITHOUT_MATRIX = {"transform": "fft", "materialize": False}

some_name = st.sampled_from(FAST_TRANSFORMS)
some_dtype = st.sampled_from(list(TOLERANCE))
exploring = settings(max_examples=150, deadline=None, derandomize=True)


def without_scipy() -> Any:
    return mock.patch.object(fast_transforms, "_scipy_dct", return_value=None)


def size_for(name: str, n: int) -> int:
    return n if name != "hadamard" or n == 1 else n + n % 2


def normal(rows: int, n: int, dtype: torch.dtype, *, seed: int = 0, transposed: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, rows, generator=generator, dtype=torch.float64).to(dtype)
    return matrix.t() if transposed else matrix.t().contiguous()


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To the tolerance of the dtype found; `expected` in float64."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[found.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scipy_too", [True, False], ids=["scipy", "torch"])
@pytest.mark.parametrize("name", FAST_TRANSFORMS)
def test_fast_transforms_equal_the_matrix_product(name: str, scipy_too: bool, dtype: torch.dtype) -> None:
    for n in {size_for(name, n) for n in SIZES}:
        rows = normal(5, n, dtype)
        with mock.patch.object(fast_transforms, "_BLOCK_ELEMENTS", {"cpu": 2 * n}):  # blocks of two rows and one
            with nullcontext() if scipy_too else without_scipy():
                fast = FastTransform(name, n, dtype=dtype, device=CPU)
            found = fast(rows)
        assert found.dtype == dtype
        assert_close(found, rows.double() @ columns(name, n))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "kind"), [("dct2", 2), ("dct3", 3)])
def test_the_fft_equals_scipys_dct_and_dct3_undoes_dct2(name: str, kind: int, dtype: torch.dtype) -> None:
    inverse = {"dct2": "dct3", "dct3": "dct2"}[name]
    for n in SIZES:
        rows = normal(4, n, dtype)
        with without_scipy():
            coordinates = FastTransform(name, n, dtype=dtype, device=CPU)(rows)
            back = FastTransform(inverse, n, dtype=dtype, device=CPU)(coordinates)
        expected = scipy.fft.dct(rows.double().numpy(), type=kind, norm="ortho", axis=1)
        assert_close(coordinates, torch.from_numpy(expected))
        assert_close(back, rows.double())


@given(
    name=some_name,
    n=st.integers(1, 300),
    rows=st.integers(0, 12),
    dtype=some_dtype,
    transposed=st.booleans(),
    scipy_too=st.booleans(),
    seed=st.integers(0, 1000),
)
@exploring
def test_transforms_agree_at_any_size_number_of_rows_and_strides(
    name: str, n: int, rows: int, dtype: torch.dtype, transposed: bool, scipy_too: bool, seed: int
) -> None:
    n = size_for(name, n)
    matrix = normal(rows, n, dtype, seed=seed, transposed=transposed)
    kept = matrix.clone()
    expected = matrix.double() @ columns(name, n)
    with nullcontext() if scipy_too else without_scipy():
        fast = Dictionary(name, n, dtype=dtype, device=CPU, transform="fft")
    assert_close(fast.transform(matrix), expected)
    assert_close(Dictionary(name, n, dtype=dtype, device=CPU).transform(matrix), expected)
    assert torch.equal(matrix, kept), "the rows are only read"


@given(
    name=some_name,
    n=st.integers(1, 200),
    rows=st.integers(0, 8),
    dtype=some_dtype,
    block=st.sampled_from([1, 300, 2**20]),
    data=st.data(),
)
@exploring
def test_columns_made_on_the_fly_project_and_lift_as_the_matrix_does(
    name: str, n: int, rows: int, dtype: torch.dtype, block: int, data: st.DataObject
) -> None:
    n = size_for(name, n)
    chosen = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True).map(sorted))
    indices = torch.tensor(chosen)
    matrix, coefficients = normal(rows, n, dtype, seed=1), normal(rows, len(chosen), dtype, seed=2)
    D = columns(name, n)[:, indices]
    with mock.patch.object(dictionaries, "BLOCK_ELEMENTS", block):
        free = Dictionary(name, n, dtype=dtype, device=CPU, transform="fft", materialize=False)
        assert_close(free.project(matrix, indices), matrix.double() @ D)
        for target in (
            matrix.clone(),
            matrix.t().clone(memory_format=torch.contiguous_format).t(),
        ):  # the left side's is a transposed view
            free.add_lifted(target, coefficients, indices, decay=0.9, scale=-0.1)
            assert_close(target, 0.9 * matrix.double() - 0.1 * coefficients.double() @ D.t())


@pytest.mark.parametrize("n", [1, 2, 60, 128, 4096])
@pytest.mark.parametrize("name", FAST_TRANSFORMS)
def test_columns_made_on_the_fly_are_those_of_the_matrix_to_the_bit(name: str, n: int) -> None:
    free = Dictionary(name, n, dtype=torch.float32, device=CPU, transform="fft", materialize=False)
    indices = torch.arange(0, n, 1 + n // 64)
    made = torch.cat([atoms for _, atoms in free._atoms_in_blocks(indices)])
    if n == 4096:  # against the definition, since the whole matrix takes seconds
        j, k = torch.arange(n), indices.unsqueeze(1)
        if name == "hadamard":
            signs = torch.tensor([bin(int(a) & int(b)).count("1") % 2 for a in indices for b in j]).view(
                len(indices), n
            )
            expected = (1.0 - 2.0 * signs) / n**0.5
        else:
            p, q = (k, j) if name == "dct2" else (j, k)
            turns = (p * (2 * q + 1) % (4 * n)).double() * (torch.pi / (2 * n))
            expected = torch.where(p == 0, (1 / n) ** 0.5, torch.cos(turns) * (2 / n) ** 0.5)
    else:
        expected = columns(name, n)[:, indices].t()
    torch.testing.assert_close(made, expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"transform": "fft"}, WITHOUT_MATRIX], ids=str)
def test_bf16_rows_are_converted_before_the_transform(options: dict[str, Any]) -> None:
    rows = normal(6, 48, torch.bfloat16)
    dictionary = Dictionary("dct2", 48, dtype=torch.float32, device=CPU, **options)
    D, indices = columns("dct2", 48), torch.tensor([0, 7, 30])
    assert_close(dictionary.transform(rows), rows.double() @ D)
    assert_close(dictionary.project(rows, indices), rows.double() @ D[:, indices])


def test_without_scipy_the_transform_is_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fast_transforms._scipy_dct() is scipy.fft.dct
    monkeypatch.setitem(sys.modules, "scipy.fft", None)
    assert fast_transforms._scipy_dct.__wrapped__() is None


class LargestTensor(TorchDispatchMode):
    """Most elements of any tensor that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


# Trion at full rank has an r x r Gram matrix, whatever the dictionary.
@pytest.mark.parametrize(("kind", "rank"), [("dct_adamw", 1), ("dct_adamw", 0.25), ("dct_adamw", 1.0), ("trion", 0.25)])
@pytest.mark.parametrize("name", FAST_TRANSFORMS)
def test_nothing_n_by_n_is_allocated_without_materialising(kind: str, name: str, rank: int | float) -> None:
    rows, n = 3, 384

    def largest(**options: Any) -> int:
        parameters = make_parameters([(rows, n)])
        with LargestTensor() as watch, without_scipy():
            optimizer = make(kind, parameters, side="right", rank=rank, dictionary=name, **options)
            for gradients in make_gradients([(rows, n)], 3):  # DCT-AdamW: with and without a refresh
                feed(optimizer, parameters, gradients)
        return watch.elements

    assert largest(**WITHOUT_MATRIX) <= n * n // 2
    assert largest(transform="fft") >= n * n, "the watch sees the matrix where there is one"


@pytest.mark.parametrize("name", FAST_TRANSFORMS)
def test_without_materialising_the_ledger_counts_o_of_n_numbers(name: str) -> None:
    n = 256
    kept, free = DictionaryCache(), DictionaryCache()
    kept.get(name, n, dtype=torch.float32, device=CPU, seed=0)
    free.get(name, n, dtype=torch.float32, device=CPU, seed=0, **WITHOUT_MATRIX)
    kept_bytes, free_bytes = (sum(tensor.nbytes for tensor in cache.tensors()) for cache in (kept, free))
    assert kept_bytes == 4 * n * n
    assert 0 < free_bytes <= 4 * 4 * n + 8 * (n // 2 + 1)  # the cosines, and the FFT's n / 2 + 1 factors


@both
@pytest.mark.parametrize("name", FAST_TRANSFORMS)
@pytest.mark.parametrize(
    "options", [{"transform": "fft"}, {"transform": "auto"}, WITHOUT_MATRIX, WITHOUT_MATRIX | {"transform": "auto"}]
)
def test_trajectories_do_not_depend_on_how_products_are_computed(kind: str, name: str, options: dict[str, Any]) -> None:
    for scipy_too in (True, False):
        parameters = make_parameters(SHAPES_FOR_HADAMARD)
        references = references_of(kind, parameters, dictionary=name)
        with nullcontext() if scipy_too else without_scipy():
            optimizer = make(kind, parameters, dictionary=name, **options)
            assert_equals_references(optimizer, parameters, references, steps=12)


@both
def test_identity_needs_no_matrix_whatever_is_said_about_it(kind: str) -> None:
    parameters = make_parameters([(8, 6)])
    optimizer = make(kind, parameters, dictionary="identity", **WITHOUT_MATRIX)
    assert_equals_references(optimizer, parameters, references_of(kind, parameters, dictionary="identity"), steps=5)
    assert optimizer.memory_bytes()["dictionary"] == 0


# `auto` -------------------------------------------------------------------------------------------------------------


def test_auto_measures_once_per_dictionary_size_dtype_and_device() -> None:
    with (
        mock.patch.dict(fast_transforms._measured, clear=True),
        mock.patch.object(fast_transforms, "_best_seconds", side_effect=[2.0, 1.0, 1.0, 2.0]) as clock,
    ):
        fft = Dictionary("dct2", 24, dtype=torch.float32, device=CPU, transform="auto")
        again = Dictionary("dct2", 24, dtype=torch.float32, device=CPU, transform="auto")
        assert clock.call_count == 2
        gemm = Dictionary("dct2", 24, dtype=torch.float64, device=CPU, transform="auto")
        assert clock.call_count == 4
        Dictionary("dct2", 24, dtype=torch.float32, device=CPU, transform="auto", materialize=False)
        Dictionary("random", 24, dtype=torch.float32, device=CPU, transform="auto")
        assert clock.call_count == 4, "nothing to choose"
    assert (fft._fast is not None, again._fast is not None, gemm._fast is not None) == (True, True, False)


def test_auto_takes_what_is_really_faster() -> None:
    def slow(rows: Tensor) -> Tensor:
        for _ in range(50):
            rows = rows * 1.0
        return rows

    with mock.patch.dict(fast_transforms._measured, clear=True):
        assert fast_transforms.faster_transform("dct2", 512, torch.float32, CPU, slow, lambda rows: rows) == "fft"
        assert fast_transforms.faster_transform("dct3", 512, torch.float32, CPU, lambda rows: rows, slow) == "gemm"


# Two ranks ----------------------------------------------------------------------------------------------------------

SHARDED_SHAPES = {"tall": (10, 6), "odd": (7, 5), "wide": (5, 12)}  # the last is compressed on the left


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for parameter, name in zip(make_parameters(list(SHARDED_SHAPES.values())), SHARDED_SHAPES, strict=True):
            self.register_parameter(name, parameter)


def _trajectory(rank: int, kind: str, strategy: str, options: dict[str, Any]) -> dict[str, Tensor]:
    model = Matrices()
    if strategy != "one process":
        sizes = (2,) if strategy == "fsdp" else (2, 1)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(int(p.shape[0] < p.shape[1])))
    # Where each rank measures for itself, they come to opposite choices.
    with (
        mock.patch.dict(fast_transforms._measured, clear=True),
        mock.patch.object(fast_transforms, "_best_seconds", side_effect=cycle([1.0, 2.0] if rank else [2.0, 1.0])),
    ):
        optimizer = make(kind, model.named_parameters(), **options)
        for gradients in make_gradients(list(SHARDED_SHAPES.values()), 10):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                if isinstance(parameter, DTensor):
                    gradient = distribute_tensor(
                        gradient, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )
                parameter.grad = gradient
            optimizer.step()
        measured = len(fast_transforms._measured)
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {name: weight.detach().clone() for name, weight in weights.items()} | {"measured": torch.tensor(measured)}


@both
def test_two_ranks_under_fsdp_follow_one_process_with_fft_and_without_the_matrix(kind: str) -> None:
    expected = _trajectory(0, kind, "one process", {})
    for options in ({"transform": "fft"}, WITHOUT_MATRIX, {"transform": "auto"}):
        for found in run_on_ranks(2, _trajectory, kind, "fsdp", options):
            for name in SHARDED_SHAPES:
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-10)


def test_auto_measures_nothing_where_replicas_repeat_the_work() -> None:
    by_strategy = {
        strategy: [int(r["measured"]) for r in run_on_ranks(2, _trajectory, "trion", strategy, {"transform": "auto"})]
        for strategy in ("fsdp", "hsdp")
    }
    assert by_strategy == {"fsdp": [2, 2], "hsdp": [0, 0]}  # n = 6, 5 (twice)
