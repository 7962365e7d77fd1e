"""Memory by cause."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
from test_throughput import Transformer
from torch import nn
from torch.distributed.fsdp import fully_shard

from dist_lowrank.telemetry.memory import memory_by_cause


def test_memory_of_a_tied_model_with_adamw_is_what_one_counts_by_hand() -> None:
    model = Transformer(tied=True)
    optimizer = torch.optim.AdamW(model.parameters())
    parameter_bytes = 4 * (10 * 4 + 4 * 4)
    assert memory_by_cause(model, optimizer) == {
        "parameters": parameter_bytes,
        "gradients": 0,
        "dense_moments": 0,
    }
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    assert memory_by_cause(model, optimizer) == {
        "parameters": parameter_bytes,
        "gradients": parameter_bytes,
        "dense_moments": 2 * parameter_bytes + 2 * 4,  # two moments and a step count for each of two tensors
    }
    optimizer.zero_grad()
    assert memory_by_cause(model, optimizer)["gradients"] == 0


def test_gradients_that_share_a_bucket_count_the_bucket_once() -> None:
    model = Transformer(tied=False)
    bucket = torch.zeros(sum(p.numel() for p in model.parameters()) + 8)  # with padding
    position = 0
    for parameter in model.parameters():
        parameter.grad = bucket[position : position + parameter.numel()].view_as(parameter)
        position += parameter.numel()
    assert memory_by_cause(model, torch.optim.SGD(model.parameters()))["gradients"] == 4 * bucket.numel()


def test_an_optimizer_that_accounts_for_itself_is_believed() -> None:
    class OneIndexPerParameter(torch.optim.Optimizer):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            super().__init__(parameters, {})
            for parameter in parameters:
                self.state[parameter]["index"] = torch.zeros(1, dtype=torch.int16)

        def memory_bytes(self) -> dict[str, int]:
            return {"indices": 2 * len(self.state), "dictionary": 512}

    model = Transformer(tied=False)
    by_cause = memory_by_cause(model, OneIndexPerParameter(list(model.parameters())))
    assert by_cause == {"parameters": 4 * 96, "gradients": 0, "indices": 6, "dictionary": 512}


def sharded_memory(rank: int) -> dict[str, int]:
    model = nn.Linear(6, 7, bias=False)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    return memory_by_cause(model, optimizer)


def test_each_rank_counts_its_own_shards_under_fsdp() -> None:
    first, second = on_two_processes(sharded_memory)
    # 7 rows on 2 ranks: 4 and 3; FSDP2 stores the weight of both ranks with the same padded size.
    assert first == {"parameters": 4 * 4 * 6, "gradients": 4 * 4 * 6, "dense_moments": 2 * 4 * 4 * 6 + 4}
    assert second == {"parameters": 4 * 4 * 6, "gradients": 4 * 4 * 6, "dense_moments": 2 * 4 * 3 * 6 + 4}


def on_two_processes(function: Callable[[int], dict[str, int]]) -> list[dict[str, int]]:
    """What the function returns on each of two forked gloo ranks."""
    context = multiprocessing.get_context("fork")

    def work(rank: int, store: str, connection: multiprocessing.connection.Connection) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        connection.send(function(rank))
        dist.barrier()
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        processes = [
            context.Process(target=work, args=(rank, f"{folder}/store", sender), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        try:
            assert all(receiver.poll(60) for receiver, _ in pipes)
            results = [receiver.recv() for receiver, _ in pipes]
        finally:
            for process in processes:
                process.join(30)
                process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return results
