"""The Triton kernels compute what their paths in torch compute; on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton", reason="triton is not installed (`make test-triton` brings it)")

from dist_lowrank.dictionaries import Dictionary, columns  # noqa: E402
from dist_lowrank.kernels.adam import adam_direction  # noqa: E402
from dist_lowrank.kernels.triton_step import column_energy, lift_into, project_and_direct  # noqa: E402
from dist_lowrank.subspaces import column_scores  # noqa: E402

SHAPES = [(130, 70, 9), (33, 96, 70), (1, 16, 16)]  # rows, n, rank: none a multiple of a tile, and less than one
BETAS, EPS, STEP = (0.9, 0.99), 1e-8, 3
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _matrix(rows: int, n: int, dtype: torch.dtype, transposed: bool) -> Tensor:
    values = torch.randn(n, rows) if transposed else torch.randn(rows, n)
    return (values.to(DEVICE, dtype).t() if transposed else values.to(DEVICE, dtype)).detach()


def _atoms(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return columns("dct2", n, dtype=torch.float32, device=DEVICE).t().contiguous().to(dtype)


def _chosen(n: int, rank: int) -> Tensor:
    return torch.randperm(n)[:rank].sort().values.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["right", "left"])
@pytest.mark.parametrize(("rows", "n", "rank"), SHAPES)
def test_a_step_in_kernels_is_the_step_in_torch(
    rows: int, n: int, rank: int, transposed: bool, dtype: torch.dtype
) -> None:
    dictionary = Dictionary("dct2", n, dtype=torch.float32, device=DEVICE)
    gradient, weight = _matrix(rows, n, dtype, transposed), _matrix(rows, n, dtype, transposed)
    indices, atoms = _chosen(n, rank), _atoms(n)
    mean, square = torch.randn(rows, rank, device=DEVICE), torch.rand(rows, rank, device=DEVICE)
    expected_mean, expected_square, expected_weight = mean.clone(), square.clone(), weight.float()

    scores = column_scores(dictionary.transform(gradient))
    torch.testing.assert_close(column_energy(gradient, atoms), scores, rtol=1e-5, atol=1e-4)

    coefficients = dictionary.project(gradient, indices)
    expected = adam_direction(coefficients.clone(), expected_mean, expected_square, STEP, BETAS, EPS)
    direction = project_and_direct(gradient, atoms, indices, mean, square, STEP, BETAS, EPS)
    for found, wanted in ((direction, expected), (mean, expected_mean), (square, expected_square)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    dictionary.add_lifted(expected_weight, expected, indices, decay=0.9, scale=-0.1)
    strides = weight.stride()
    lift_into(weight, direction, atoms, indices, decay=0.9, scale=-0.1)
    assert weight.stride() == strides
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7  # the interpreter cuts bfloat16 off, a GPU rounds
    torch.testing.assert_close(weight.float(), expected_weight, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu  # the interpreter multiplies the bits of bfloat16 as integers
def test_a_dictionary_in_bfloat16_rounds_operands_alone() -> None:
    gradient, atoms = _matrix(40, 64, torch.float32, False), _atoms(64, torch.bfloat16)
    rounded = gradient.bfloat16().float() @ atoms.float().t()
    torch.testing.assert_close(column_energy(gradient, atoms), column_scores(rounded), rtol=1e-5, atol=1e-4)


def test_the_same_energies_twice_to_the_bit() -> None:
    gradient, atoms = _matrix(200, 64, torch.float32, False), _atoms(64)
    assert torch.equal(column_energy(gradient, atoms), column_energy(gradient, atoms))


def test_no_rows_have_no_energy() -> None:
    assert torch.equal(column_energy(torch.zeros(0, 32, device=DEVICE), _atoms(32)), torch.zeros(32, device=DEVICE))


def test_other_dtypes_and_strides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float64.*allowed: torch\.float32"):
        column_energy(torch.zeros(4, 16, dtype=torch.float64, device=DEVICE), _atoms(16))
    with pytest.raises(ValueError, match="allowed: contiguous"):
        column_energy(torch.zeros(4, 16, device=DEVICE), _atoms(16).t())
