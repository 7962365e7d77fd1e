"""What training loops do around `step()` changes nothing, under every sharding: accumulation, clipping, loss scaling.

A small network on real processes; each rank has its share of the batch. The trajectory of one process on the whole
batch, without the idiom, is what comes out.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from sharded_models import full, shard
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_lowrank.optim import DCTAdamW, Trion
from dist_lowrank.sharding.flat_slices import FlatSlice
from dist_lowrank.sharding.pieces import FlatPart

STEPS = 6
SAMPLES = 16  # in a batch, over all ranks
MAX_NORM = 0.05  # below the norm of every gradient
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "dct_adamw": (DCTAdamW, {"lr": 0.01, "weight_decay": 0.1, "rank": 0.5, "betas": (0.8, 0.9)}),
    "dct_adamw_int8": (
        DCTAdamW,
        {"lr": 0.01, "rank": 0.5, "error_feedback": "int8", "moment_dtype": torch.int8, "refresh_interval": 2},
    ),
    "trion": (Trion, {"lr": 0.01, "rank": 0.5, "dense_lr": 0.01}),
}
SHARDINGS = [("ddp", 1), ("ddp", 2), ("ddp", 4), ("fsdp", 1), ("fsdp", 2), ("fsdp", 4), ("fsdp_rows", 4), ("hsdp", 4)]
under_every_sharding = pytest.mark.parametrize(("strategy", "world_size"), SHARDINGS)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
with_low_bit_state = pytest.mark.parametrize("optimizer", ["dct_adamw_int8", "trion"])


class Network(nn.Sequential):
    """A tall, a wide and an odd matrix, with biases."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 7))
        self.double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return tuple(torch.randn(SAMPLES, width, generator=generator, dtype=torch.float64) for width in (6, 7))  # type: ignore[return-value]


class Loop:
    """A training loop with the idioms that it is told to use."""

    def __init__(self, strategy: str, world_size: int, optimizer: str, scaler: Any = None) -> None:
        make, options = OPTIMIZERS[optimizer]
        network = Network()
        shard(network, strategy, world_size, options["rank"])
        self.strategy, self.world_size = strategy, world_size
        self.distributed = dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.network = DistributedDataParallel(network) if strategy == "ddp" and self.distributed else network
        self.optimizer = make(self.network.named_parameters(), **options)
        self.scaler = scaler
        self.take_step: Any = self.optimizer.step

    def micro_batches(self, step: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """This rank's samples, in `count` parts."""
        inputs, targets = (part.chunk(self.world_size)[self.rank] for part in batch(step))
        return list(zip(inputs.chunk(count), targets.chunk(count), strict=True))

    @contextlib.contextmanager
    def without_sync(self) -> Any:
        """Gradients are summed over ranks only with the last micro-batch."""
        if isinstance(self.network, DistributedDataParallel):
            with self.network.no_sync():
                yield
        elif self.strategy != "ddp":
            self.network.set_requires_gradient_sync(False)
            yield
            self.network.set_requires_gradient_sync(True)
        else:
            yield

    def backward(self, step: int, micro_batches: int = 1, sync_each: bool = False, factor: float = 1.0) -> None:
        parts = self.micro_batches(step, micro_batches)
        for index, (inputs, targets) in enumerate(parts):
            waits = index + 1 < len(parts) and not sync_each
            with self.without_sync() if waits else contextlib.nullcontext():
                loss = (self.network(inputs) - targets).square().mean() / len(parts) * factor
                (self.scaler.scale(loss) if self.scaler else loss).backward()

    def update(self, clip: bool = False) -> None:
        if self.scaler and clip:
            self.scaler.unscale_(self.optimizer)
        if clip:
            norm = nn.utils.clip_grad_norm_(self.network.parameters(), MAX_NORM)
            assert full(norm) > MAX_NORM
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.take_step()
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        return {name.removeprefix("module."): full(p) for name, p in self.network.named_parameters()}

    def state_bits(self) -> dict[str, Tensor]:
        """Every number that this rank keeps, by place."""
        states = [self.optimizer.state[p] for p in self.network.parameters()]
        return {f"{i}.{key}": _local(value) for i, state in enumerate(states) for key, value in state.items()}


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _train(
    _: int,
    strategy: str,
    world_size: int,
    optimizer: str,
    *,
    clip: bool = False,
    scaled: bool = False,
    backend: str | None = None,
    skipped: int = -1,
    **how: Any,
) -> dict[str, Tensor]:
    """The weights after STEPS steps; step `skipped` is left out."""
    loop = Loop(strategy, world_size, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**8) if scaled else None)
    if backend:
        loop.take_step = torch.compile(loop.optimizer.step, backend=backend)
    for step in range(STEPS):
        if step != skipped:
            loop.backward(step, **how)
            loop.update(clip)
    return loop.weights()


@cache
def one_process(optimizer: str, clip: bool = False, skipped: int = -1) -> dict[str, Tensor]:
    return _train(0, "ddp", 1, optimizer, clip=clip, skipped=skipped)


def on_ranks(
    strategy: str, world_size: int, optimizer: str, seconds: float = 60, **how: Any
) -> list[dict[str, Tensor]]:
    def train(rank: int) -> dict[str, Tensor]:
        return _train(rank, strategy, world_size, optimizer, **how)

    return run_on_ranks(world_size, train, timeout_seconds=seconds)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize("optimizer", ["dct_adamw", "trion"])
@under_every_sharding
@pytest.mark.parametrize("sync_each", [False, True], ids=["synced-at-the-end", "synced-each-time"])
def test_accumulating_micro_batches_equals_one_batch(
    strategy: str, world_size: int, optimizer: str, sync_each: bool
) -> None:
    for found in on_ranks(strategy, world_size, optimizer, micro_batches=4, sync_each=sync_each):
        assert_same(found, one_process(optimizer))


@every_optimizer
@under_every_sharding
def test_clipping_the_gradient_norm_equals_one_process(strategy: str, world_size: int, optimizer: str) -> None:
    for found in on_ranks(strategy, world_size, optimizer, clip=True):
        assert_same(found, one_process(optimizer, clip=True))
    free = one_process(optimizer)  # Trion's own step does not see the scale, its dense path does
    assert any(not torch.allclose(free[name], weight, atol=1e-6) for name, weight in found.items())


@with_low_bit_state
@under_every_sharding
def test_a_gradient_scaler_with_accumulation_and_clipping_changes_nothing(
    strategy: str, world_size: int, optimizer: str
) -> None:
    for found in on_ranks(strategy, world_size, optimizer, scaled=True, clip=True, micro_batches=2):
        assert_same(found, one_process(optimizer, clip=True))


# A gradient that is not finite -------------------------------------------------------------------------------------


def _overflow(rank: int, strategy: str, world_size: int, optimizer: str, sharded: bool, clip: bool) -> dict[str, Any]:
    scaler = ShardedGradScaler("cpu", init_scale=256.0) if sharded else torch.amp.GradScaler("cpu", init_scale=256.0)
    loop = Loop(strategy, world_size, optimizer, scaler)
    for step in range(STEPS):
        poisoned = step == 2
        before = (loop.weights(), loop.state_bits())
        loop.backward(step, factor=float("inf") if poisoned and rank == world_size - 1 else 1.0)
        if clip:
            scaler.unscale_(loop.optimizer)
        loop.update()
        if poisoned:
            after = (loop.weights(), loop.state_bits())
            untouched = all(
                torch.equal(old[key], new[key]) for old, new in zip(before, after, strict=True) for key in new
            )
            scale = scaler.get_scale()
    steps = {float(state["step"]) for state in loop.optimizer.state.values()}
    return {"weights": loop.weights(), "untouched": untouched, "scale": scale, "steps": steps}


@with_low_bit_state
@under_every_sharding
@pytest.mark.parametrize("sharded", [False, True], ids=["GradScaler", "ShardedGradScaler"])
def test_an_overflow_on_one_rank_skips_the_step_on_all_and_leaves_every_bit_of_state(
    strategy: str, world_size: int, optimizer: str, sharded: bool
) -> None:
    """Reducing gradients spreads it to other ranks, and torch's check of DTensors to all shards."""
    results = run_on_ranks(world_size, _overflow, strategy, world_size, optimizer, sharded, False)
    for result in results:
        assert result["untouched"]
        assert result["steps"] == {STEPS - 1}
        assert result["scale"] == 128.0
        assert_same(result["weights"], one_process(optimizer, skipped=2))


def _overflow_in_one_shard(rank: int, strategy: str, world_size: int, optimizer: str, kind: str) -> dict[str, Any]:
    """As `_overflow`, but after the reduction, in one element of one rank's shard."""
    scaler = (
        ShardedGradScaler("cpu", init_scale=256.0)
        if kind == "sharded"
        else torch.amp.GradScaler("cpu", init_scale=256.0)
    )
    loop = Loop(strategy, world_size, optimizer, scaler)
    for step in range(STEPS):
        before = (loop.weights(), loop.state_bits())
        loop.backward(step)
        if step == 2 and rank == world_size - 1:
            gradient = loop.network[0].weight.grad
            assert gradient.to_local().numel()
            gradient.to_local()[0, 0] = float("inf")
        loop.update()
        if step == 2:
            after = (loop.weights(), loop.state_bits())
            untouched = all(
                torch.equal(old[key], new[key]) for old, new in zip(before, after, strict=True) for key in new
            )
    return {"weights": loop.weights(), "untouched": untouched}


@with_low_bit_state
@pytest.mark.parametrize("kind", ["plain", "sharded"])
@pytest.mark.parametrize(("strategy", "world_size"), [("fsdp", 2), ("fsdp", 4), ("fsdp_rows", 4)])
def test_an_overflow_in_the_shard_of_one_rank_skips_the_step_on_all(
    strategy: str, world_size: int, optimizer: str, kind: str
) -> None:
    for result in run_on_ranks(world_size, _overflow_in_one_shard, strategy, world_size, optimizer, kind):
        assert result["untouched"]
        assert_same(result["weights"], one_process(optimizer, skipped=2))


def _flat_overflow(rank: int, world_size: int, poisoned: int) -> Tensor:
    """Flat slices of one matrix are plain tensors to a scaler: only one that asks the other ranks can tell."""
    generator = torch.Generator().manual_seed(5)
    whole = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    cuts = [0, 19, 25, 25, 48]
    mine = slice(cuts[rank], cuts[rank + 1])
    parameter = nn.Parameter(whole.flatten()[mine].clone())
    optimizer = DCTAdamW([parameter], lr=0.01, rank=0.5)
    slices = tuple(FlatSlice((8, 6), cuts[other], cuts[other + 1]) for other in range(world_size))
    optimizer.declare_flat_parts({parameter: [FlatPart("weight", 0, slices)]}, dist.group.WORLD)
    scaler = ShardedGradScaler("cpu", init_scale=256.0)
    for step in range(4):
        gradient = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        loss = (parameter * gradient.flatten()[mine]).sum()
        scaler.scale(loss * (float("inf") if (step, rank) == (poisoned, 0) else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, parameter.detach())
    return torch.cat(parts).view(8, 6)


def test_flat_slices_skip_together_with_the_sharded_gradient_scaler() -> None:
    generator = torch.Generator().manual_seed(5)
    parameter = nn.Parameter(torch.randn(8, 6, generator=generator, dtype=torch.float64))
    optimizer = DCTAdamW([parameter], lr=0.01, rank=0.5)
    for step in range(4):
        parameter.grad = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        if step != 1:
            optimizer.step()
    for found in run_on_ranks(4, _flat_overflow, 4, 1):
        torch.testing.assert_close(found, parameter.detach(), atol=1e-10, rtol=0)


# torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
@pytest.mark.parametrize("optimizer", ["dct_adamw", "trion"])
@pytest.mark.parametrize(
    ("strategy", "world_size", "backend"),
    [
        ("ddp", 1, "aot_eager"),
        pytest.param("fsdp", 2, "eager", marks=pytest.mark.slow),
        *(
            pytest.param(*case, backend, marks=pytest.mark.slow)
            for backend in ("aot_eager", "inductor")
            for case in [("ddp", 1), ("ddp", 2), ("fsdp", 2), ("fsdp_rows", 4), ("hsdp", 4)]
            if (*case, backend) != ("ddp", 1, "aot_eager")
        ),
    ],
)
def test_a_compiled_step_gives_the_trajectory_of_the_uncompiled(
    strategy: str, world_size: int, backend: str, optimizer: str
) -> None:
    if backend == "inductor" and not cpp_compiler():
        pytest.skip("needs a C++ compiler")
    for found in on_ranks(strategy, world_size, optimizer, seconds=500, backend=backend):
        assert_same(found, one_process(optimizer))


def cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False
