"""Speed: arithmetic per token, peak of the GPU, and the time that steps and the optimizer take."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

# Dense peaks (without structured sparsity) in 1e12 operations per second, from NVIDIA's data sheets. 16-bit and tf32
# figures accumulate in fp32; fp32 is without tensor cores. Keys match the names that `torch.cuda.get_device_name`
# gives. Names that do not match to their end (MIG slices, laptop chips, custom variants) have no figure: none is better
# than a wrong one.
_PEAK_TERAFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"A100-(SXM4?|PCIE)-[48]0GB$|A100 80GB PCIe$", {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    (r"H[12]00 NVL$", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    (r"H100 PCIe$", {"bf16": 756.0, "fp16": 756.0, "tf32": 378.0, "fp32": 51.0}),
    (r"H100 80GB HBM3$|H200$", {"bf16": 989.0, "fp16": 989.0, "tf32": 494.5, "fp32": 67.0}),
    (r"B200$", {"bf16": 2250.0, "fp16": 2250.0, "tf32": 1100.0, "fp32": 75.0}),
    (r"L40S$", {"bf16": 362.05, "fp16": 362.05, "tf32": 183.0, "fp32": 91.6}),
    (r"RTX 4090$", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
)


def peak_flops_per_second(device_name: str, dtype: str) -> float | None:
    """Dense peak of one NVIDIA GPU, the denominator of MFU.

    Args:
        device_name: As `torch.cuda.get_device_name()` gives it, such as "NVIDIA H100 80GB HBM3".
        dtype: Of the matrix products: "bf16", "fp16", "tf32" (float32 tensors where torch allows TF32) or "fp32".

    Returns:
        Floating-point operations per second; None where no figure is known for the GPU or the dtype.
    """
    for pattern, teraflops in _PEAK_TERAFLOPS:
        if re.search(rf"\b(?:{pattern})", device_name):
            return teraflops[dtype] * 1e12 if dtype in teraflops else None
    return None


def matmul_parameter_count(model: nn.Module) -> int:
    """Number of parameters that a token is multiplied with: all except lookup tables, the output head included.

    A table that is tied to the head counts once, as the head. Norms and biases are counted too, as is usual; they are
    a fraction of a percent. Sharded parameters (DTensor) count with their global size.
    """
    modules = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    multiplied = {id(parameter): parameter for module in modules for parameter in module.parameters(recurse=False)}
    return sum(parameter.numel() for parameter in multiplied.values())


def dense_transformer_flops_per_token(
    matmul_parameters: int, layers: int, attention_width: int, sequence_length: int
) -> int:
    """Forward and backward operations per trained token: 6 N + 12 L W S (PaLM, arXiv 2204.02311, appendix B).

    N is `matmul_parameter_count(model)`; L the layers; W the attention's width, heads times head dimension; S the
    sequence length in tokens. As in the paper, attention counts as if it were not causal, and recomputation does not
    count.
    """
    return 6 * matmul_parameters + 12 * layers * attention_width * sequence_length


def model_flops_per_token(model: nn.Module, sequence_length: int) -> int | None:
    """`dense_transformer_flops_per_token` of a `transformers` model, from its parameters and its `config`.

    Args:
        model: Before it is wrapped in another module, such as DDP's, that has no `config`.
        sequence_length: In tokens.

    Returns:
        Operations per token; None where the formula does not hold: a mixture of experts, or no attention heads.
    """
    config = getattr(model, "config", None)
    experts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    layers = getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_attention_heads", None)
    hidden_size = getattr(config, "hidden_size", None)
    if any(experts) or layers is None or heads is None or hidden_size is None:
        return None
    head_size = getattr(config, "head_dim", None) or hidden_size // heads
    return dense_transformer_flops_per_token(matmul_parameter_count(model), layers, heads * head_size, sequence_length)


@dataclass(frozen=True)
class StepTimes:
    """Sums over the steps between two log entries, on this rank."""

    steps: int
    tokens: int
    seconds: float
    optimizer_seconds: float

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def optimizer_milliseconds(self) -> float:
        """Mean per step."""
        return 1000 * self.optimizer_seconds / self.steps

    @property
    def optimizer_share(self) -> float:
        """Fraction of the wall time that the optimizer took, 0 to 1."""
        return self.optimizer_seconds / self.seconds


class StepTimer:
    """Times steps, and the optimizer's part of them, from its construction on.

        timer = StepTimer(device)
        for batch in batches:
            ...
            with timer.optimizer():
                optimizer.step()
            timer.end_step(tokens)
            if time_to_log:
                times = timer.read()

    On a GPU the optimizer is timed with pairs of events on the current stream, so nothing waits inside a step; `read`
    waits for the device, which also makes the wall time of the interval the device's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._begin()

    def _begin(self) -> None:
        self._steps = 0
        self._tokens = 0
        self._optimizer_seconds = 0.0
        self._paused_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._started_seconds = time.perf_counter()

    @contextmanager
    def optimizer(self) -> Iterator[None]:
        """Times the optimizer's part of a step."""
        if self._on_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            started_seconds = time.perf_counter()
            yield
            self._optimizer_seconds += time.perf_counter() - started_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what is not training, such as an evaluation. Waits for the device on both ends."""
        self._wait_for_device()
        started_seconds = time.perf_counter()
        yield
        self._wait_for_device()
        self._paused_seconds += time.perf_counter() - started_seconds

    def end_step(self, tokens: int) -> None:
        """Counts one finished step.

        Args:
            tokens: That the step trained on. Throughput is of whatever is counted here: pass the tokens of all ranks
                for the throughput of the job.
        """
        self._steps += 1
        self._tokens += tokens

    def read(self) -> StepTimes:
        """Times since the last `read` (or the construction), and begins the next interval.

        Raises:
            RuntimeError: No step has ended since then.
        """
        if self._steps == 0:
            raise RuntimeError("StepTimer.read(): no step has ended since the last read")
        self._wait_for_device()
        optimizer_seconds = self._optimizer_seconds + sum(start.elapsed_time(end) / 1000 for start, end in self._events)
        seconds = time.perf_counter() - self._started_seconds - self._paused_seconds
        times = StepTimes(self._steps, self._tokens, seconds, optimizer_seconds)
        self._begin()
        return times

    def _wait_for_device(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize(self._device)
