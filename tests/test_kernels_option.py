"""`kernels="triton"` is refused where kernels do not cover the options, or do not run; and that is told in time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from trajectories import make_parameters

from dist_lowrank.config import ConfigError, compose
from dist_lowrank.launchers.preparation import check_run
from dist_lowrank.optim import DCTAdamW
from dist_lowrank.planning.plan import Planner

TINY = ["model.config.hidden_size=32", "model.config.intermediate_size=64", "data.vocab_size=512"]


@pytest.fixture(params=["without the package", "without a GPU"])
def reason(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    if request.param == "without the package":
        monkeypatch.setitem(sys.modules, "triton", None)
        return "the package triton is not installed"
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    (tmp_path / "triton.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    return "on the device type 'cpu'; triton on 'cuda'"


def test_a_machine_that_cannot_says_so_before_anything_is_updated(reason: str) -> None:
    (parameter,) = make_parameters([(8, 6)], torch.float32)
    parameter.grad = torch.ones_like(parameter)
    optimizer = DCTAdamW([("attention.q", parameter)], kernels="triton")
    with pytest.raises(ValueError, match=f"'attention.q' .*kernels: 'triton' is not allowed; allowed: torch.*{reason}"):
        optimizer.step()
    assert torch.equal(parameter, make_parameters([(8, 6)], torch.float32)[0])


def test_the_command_line_says_so_before_any_process_starts(reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer\.kernels: 'triton' is not allowed; allowed: torch.*{reason}"):
        check_run(["optimizer.kernels=triton"])


def test_what_runs_elsewhere_can_be_planned_and_rendered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert Planner(compose(["optimizer.kernels=triton", *TINY]), 2).plan().peak_bytes.max() > 0
    check_run(["optimizer.kernels=triton", "launcher=torchrun", "launcher.hosts=[node0,node1]", *TINY])


@pytest.mark.parametrize(
    "options",
    [
        {"error_feedback": "int8"},
        {"column_bias_correction": True},
        {"moment_dtype": torch.int8},
        {"ranking": "l1"},
        {"selection": "previous"},
        {"dictionary": "identity"},
        {"dictionary": "shared"},
        {"transform": "fft"},
    ],
    ids=str,
)
def test_options_without_a_kernel_are_refused(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"kernels: 'triton' is not allowed; allowed: torch with {name}={value!r}"):
        DCTAdamW(make_parameters([(8, 6)]), kernels="triton", **options)


def test_other_names_and_float64_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="kernels: 'cuda' is not allowed; allowed: torch, triton"):
        DCTAdamW(make_parameters([(8, 6)]), kernels="cuda")
    with pytest.raises(ConfigError, match=r"optimizer\.kernels: cuda is not allowed; .*torch, triton"):
        compose(["optimizer.kernels=cuda"])
    optimizer = DCTAdamW([Parameter(torch.zeros(8, 6, dtype=torch.float64))], kernels="triton")
    with pytest.raises(ValueError, match=r"allowed: torch for parameters of torch\.float64"):
        optimizer.bind()
