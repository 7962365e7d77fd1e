"""With `capturable=True` a step can be repeated as a CUDA graph repeats it: the same operators on the same memory.

A graph holds what operators were given: tensors by their memory, Python's numbers as they were. So does `Recording`, of
all operators that reach torch's dispatcher, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sharded_models import full
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from trajectories import MIXED_SHAPES, SHAPES, both, make, make_gradients, make_parameters

from dist_lowrank.optim import DCTAdamW, Trion, full_state_dict

CAPTURABLE: dict[str, Any] = {"capturable": True, "verify_every": 0, "agree_on_gradients": False}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dct_adamw": ("dct_adamw", {"refresh_interval": 1}),
    "feedback": (
        "dct_adamw",
        {"refresh_interval": 1, "error_feedback": "fp32", "error_feedback_momentum": True},
    ),
    "ages": ("dct_adamw", {"refresh_interval": 1, "column_bias_correction": True, "error_feedback": "int8"}),
    "bf16 operands": ("dct_adamw", {"refresh_interval": 1, "transform_precision": "bf16"}),
    "trion": ("trion", {}),
    "trion, no decay": ("trion", {"weight_decay": 0.0, "scale": "match_rms_adamw"}),
}
STEPS, RECORDED = 9, 3
RATES = [0.02 * (1 + step % 4) for step in range(STEPS)]


class Recording(TorchDispatchMode):
    """All operators within, with what they were given; none of which reads a number off a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        made: dict[int, Tensor] = {}  # in place of the tensors that operators made when they were recorded

        def now(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, recorded in self.calls:
            result = func(*tree_map(now, args), **tree_map(now, kwargs))
            for before, after in zip(_tensors(recorded), _tensors(result), strict=True):
                made[id(before)] = after


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [each for part in value for each in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _fed(optimizer: Any, parameters: list[Parameter], rate: float, gradients: list[Tensor]) -> Callable[[], None]:
    """Puts a rate and gradients where the optimizer finds them; into the same memory where there is some."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(gradient)
    return optimizer.step  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_recorded_step_repeats_as_the_steps_that_follow_would_be(name: str, dtype: torch.dtype) -> None:
    kind, options = KINDS[name]
    shapes = [*SHAPES, *MIXED_SHAPES[2:]]
    eager, captured = make_parameters(shapes, dtype), make_parameters(shapes, dtype)
    reference = make(kind, eager, **options | {"lr": RATES[0]})
    optimizer = make(kind, captured, **options | CAPTURABLE | {"lr": torch.tensor(RATES[0], dtype=torch.float64)})
    recording = Recording()
    for step, gradients in enumerate(make_gradients(shapes, STEPS)):
        _fed(reference, eager, RATES[step], gradients)()
        take_step = _fed(optimizer, captured, RATES[step], gradients)
        if step < RECORDED:
            take_step()
        elif step == RECORDED:
            with recording:
                take_step()
        else:
            recording.replay()
        # Operands of bfloat16 are rounded after they were multiplied by the rate, without it before.
        narrow = dtype == torch.bfloat16 or "transform_precision" in options
        for left, right in zip(captured, eager, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-2 if narrow else 1e-9, atol=1e-2 if narrow else 1e-9)
    if dtype == torch.float64:
        for left, right in zip(captured, eager, strict=True):
            kept, expected = optimizer.state[left], reference.state[right]
            assert kept.keys() == expected.keys()
            assert float(kept["step"]) == STEPS
            assert "indices" not in expected or torch.equal(kept["indices"], expected["indices"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_a_captured_graph_follows_the_steps_that_are_not_captured(name: str) -> None:
    kind, options = KINDS[name]
    shapes = [*SHAPES, *MIXED_SHAPES[2:]]
    eager, captured = (
        [Parameter(each.detach().cuda()) for each in make_parameters(shapes, torch.float32)] for _ in range(2)
    )
    reference = make(kind, eager, **options | {"lr": RATES[0]})
    optimizer = make(kind, captured, **options | CAPTURABLE | {"lr": torch.tensor(RATES[0], device="cuda")})
    graph = torch.cuda.CUDAGraph()
    beside = torch.cuda.Stream()
    for step, gradients in enumerate(make_gradients(shapes, STEPS)):
        _fed(reference, eager, RATES[step], gradients)()
        take_step = _fed(optimizer, captured, RATES[step], gradients)
        if step < RECORDED:
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                take_step()
            torch.cuda.current_stream().wait_stream(beside)
            continue
        if step == RECORDED:
            with torch.cuda.graph(graph):
                take_step()
        graph.replay()
        for left, right in zip(captured, eager, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-2, atol=1e-2)


def test_without_it_the_host_reads_the_step() -> None:
    parameters = make_parameters([(8, 6)])
    optimizer = make("dct_adamw", parameters, refresh_interval=1)
    parameters[0].grad = torch.ones_like(parameters[0])
    with pytest.raises(AssertionError, match="the host reads a number"), Recording():
        optimizer.step()


@both
def test_steps_are_those_without_it(kind: str) -> None:
    """With a rate that is a number, to the bit; one that is a tensor multiplies elsewhere."""
    first, second = make_parameters(SHAPES, torch.float32), make_parameters(SHAPES, torch.float32)
    options = {"refresh_interval": 1} if kind == "dct_adamw" else {}
    plain, capturable = make(kind, first, **options), make(kind, second, **options, **CAPTURABLE)
    for gradients in make_gradients(SHAPES, 5):
        for optimizer, parameters in ((plain, first), (capturable, second)):
            _fed(optimizer, parameters, 0.02, gradients)()
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_state_loads_from_one_to_the_other() -> None:
    gradients = make_gradients(SHAPES, 6)
    parameters = make_parameters(SHAPES)
    plain = make("dct_adamw", parameters, refresh_interval=1)
    for each in gradients[:3]:
        _fed(plain, parameters, 0.02, each)()
    others = make_parameters(SHAPES)
    with torch.no_grad():
        for other, parameter in zip(others, parameters, strict=True):
            other.copy_(parameter)
    capturable = make("dct_adamw", others, refresh_interval=1, **CAPTURABLE)
    saved = full_state_dict(plain)
    saved["param_groups"] = capturable.state_dict()["param_groups"]  # with its options
    capturable.load_state_dict(saved)
    for each in gradients[3:]:
        _fed(plain, parameters, 0.02, each)()
        _fed(capturable, others, 0.02, each)()
    assert all(torch.equal(full(a), full(b)) for a, b in zip(parameters, others, strict=True))


def test_on_a_device_nothing_is_read_back_and_counters_are_there() -> None:
    """Of matrices; torch's fused AdamW, the dense path, takes a rate that is a tensor, but not one without a value."""
    for make_optimizer in (DCTAdamW, Trion):
        parameters = [Parameter(torch.empty(shape, device="meta")) for shape in ((8, 6), (6, 8))]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = make_optimizer(parameters, lr=0.01, **CAPTURABLE)
        optimizer.param_groups[0]["lr"] = torch.empty((), device="meta")
        optimizer.step()
        optimizer.step()
        assert {optimizer.state[parameter]["step"].device.type for parameter in parameters} == {"meta"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh_interval": 2}, "False with refresh_interval=2, True with 1"),
        ({"weight_rounding": "stochastic"}, "False with weight_rounding='stochastic'"),
        ({"moment_dtype": torch.int8}, r"False with moment_dtype=torch\.int8"),
        ({"dictionary": "shared"}, "False with dictionary='shared'"),
        ({"selection": "previous"}, "False with selection='previous'"),
        ({"kernels": "triton"}, "False with kernels='triton'"),
        ({"verify_every": 100}, "with verify_every=0"),
        ({"agree_on_gradients": True}, "agree_on_gradients=False"),
    ],
    ids=str,
)
def test_what_differs_from_step_to_step_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"capturable: True is not allowed; allowed: .*{message}"):
        DCTAdamW(make_parameters([(8, 6)]), **CAPTURABLE | options)


def test_a_rate_on_another_device_is_refused() -> None:
    optimizer = DCTAdamW(make_parameters([(8, 6)]), **CAPTURABLE)
    optimizer.param_groups[0]["lr"] = torch.empty((), device="meta")
    with pytest.raises(ValueError, match=r"lr: .* is not allowed; allowed: a number, or a tensor on cpu"):
        optimizer.bind()
