"""Steps on dictionary columns, and the orthogonalised ones, never wait for a device: nothing is read back from it.

Parameters, gradients and state are on torch's `meta` device, whose tensors have no values: reading one raises. So a GPU
gets the whole step, ordinary or refresh, in one queue. (Counters of steps are on the host, and so is what follows from
them alone.) Subspaces by SVD do read back, and those drawn at random.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from dist_lowrank.optim import SCALE, Adafactor, DCTAdamW, Dion3, Fira, Frugal, GaLore, Muon, Trion

SHAPES = [(24, 16), (16, 24), (16, 16), (8, 12, 3), (16,)]
OPTIMIZERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "dct_adamw": (DCTAdamW, {"refresh_interval": 2}),
    "dct_adamw, ages": (DCTAdamW, {"column_bias_correction": True}),
    "dct_adamw, feedback": (DCTAdamW, {"error_feedback": "int8", "refresh_interval": 2}),
    "dct_adamw, moments int8": (DCTAdamW, {"moment_dtype": torch.int8}),
    "dct_adamw, fft": (DCTAdamW, {"transform": "fft", "materialize": False}),
    "dct_adamw, bf16 operands": (DCTAdamW, {"transform_precision": "bf16", "refresh_interval": 2}),
    "trion": (Trion, {}),
    "trion, bf16 operands": (Trion, {"transform_precision": "bf16"}),
    "fira on columns": (Fira, {"subspace": "dct2", "refresh_interval": 2}),
    "frugal on columns": (Frugal, {"subspace": "dct2", "refresh_interval": 2}),
    "muon": (Muon, {}),
    "dion3": (Dion3, {}),
    "scale": (SCALE, {"vocabulary": "head"}),
    "adafactor": (Adafactor, {}),
}
READS_BACK = {"galore": (GaLore, {})}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ordinary_and_refresh_steps_read_nothing_back(name: str) -> None:
    optimizer = _on_meta(name)
    for _ in range(4):
        optimizer.step()


def test_reading_a_number_back_would_be_noticed() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        _on_meta("galore").step()


def _on_meta(name: str) -> Any:
    make, options = READS_BACK.get(name) or OPTIMIZERS[name]
    dtypes = (torch.float32, torch.bfloat16)
    parameters = [Parameter(torch.empty(shape, dtype=each, device="meta")) for shape in SHAPES for each in dtypes]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    return make(parameters, lr=0.01, verify_every=0, **options)
