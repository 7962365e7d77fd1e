"""How many collectives one step sends, of how many numbers, under each sharding."""

from __future__ import annotations

import pytest
import torch
from collectives import CountCollectives
from processes import run_on_ranks
from sharded_models import OPTIMIZERS, SHAPES, Model, matrix_forms, shard

from dist_lowrank.sharding.layouts import tall_form


def _collectives(
    rank: int, strategy: str, world_size: int, optimizer: str, workspace_bytes: int | None = None
) -> list[list[tuple[str, int]]]:
    make, options = OPTIMIZERS[optimizer]
    model = Model(SHAPES, torch.float32)
    shard(model, strategy, world_size, options["rank"])
    if workspace_bytes is not None:
        options = {**options, "workspace_bytes": workspace_bytes}
    updater = make(model.named_parameters(), agree_on_gradients=False, **options)
    calls = []
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with CountCollectives() as counter:
            updater.step()
        calls.append(counter.calls)
    return calls


def test_dct_adamw_under_fsdp_sends_one_all_reduce_of_the_sum_of_all_n() -> None:
    sum_of_n = sum(form.n for form in matrix_forms(OPTIMIZERS["dct_adamw"][1]))
    for calls in run_on_ranks(4, _collectives, "fsdp", 4, "dct_adamw"):
        assert calls == [[("allreduce_", sum_of_n)]] * 4


def test_dct_adamw_sends_nothing_between_refreshes() -> None:
    for calls in run_on_ranks(2, _collectives, "fsdp", 2, "dct_adamw_every_third"):
        assert [len(step) for step in calls] == [1, 0, 1, 0]


def test_trion_under_fsdp_sends_two_all_reduces() -> None:
    forms = matrix_forms(OPTIMIZERS["trion"][1])
    expected = [("allreduce_", sum(form.n for form in forms)), ("allreduce_", sum(form.rank**2 for form in forms))]
    for calls in run_on_ranks(4, _collectives, "fsdp", 4, "trion"):
        assert calls == [expected] * 4


def test_misaligned_matrices_are_exchanged_in_one_all_to_all_and_their_sums_fused() -> None:
    """Under plain Shard(0) the two wide matrices are cut along the compressed axis; r x ranks > n, so rows go back."""
    world_size = 4
    forms = matrix_forms(OPTIMIZERS["dct_adamw"][1])
    wide = [form for form in forms if form.transposed]
    results = run_on_ranks(world_size, _collectives, "fsdp_rows", world_size, "dct_adamw")
    for calls in results:
        for step in calls:
            assert [name for name, _ in step] == ["alltoall_base_", "allreduce_", "alltoall_base_"]
            assert step[1][1] == sum(form.n for form in forms)
    for position in (0, 2):  # all ranks together send each matrix once, there and back
        sent = sum(calls[0][position][1] for calls in results)
        assert sent == sum(form.rows * form.n for form in wide)


def test_the_unsharded_side_never_exchanges_rows() -> None:
    forms = [tall_form(shape, "unsharded", 0.5) for shape in SHAPES.values() if len(shape) == 2]
    assert {form.side for form in forms} == {"right"}  # under Shard(0), also for wide matrices
    for calls in run_on_ranks(4, _collectives, "fsdp_rows", 4, "dct_adamw_unsharded"):
        assert calls == [[("allreduce_", sum(form.n for form in forms))]] * 4


@pytest.mark.parametrize("optimizer", ["dct_adamw", "trion"])
def test_ddp_moves_coefficients_not_matrices(optimizer: str) -> None:
    world_size = 4
    forms = matrix_forms(OPTIMIZERS[optimizer][1])
    padded_rows_by_rank = sum(-(-form.rows // world_size) * form.rank for form in forms)
    for calls in run_on_ranks(world_size, _collectives, "ddp", world_size, optimizer):
        for step in calls[1:]:  # the first step also compares the replicas
            gathers = [elements for name, elements in step if "gather" in name]
            assert gathers == [padded_rows_by_rank]
            sums = [elements for name, elements in step if "reduce" in name]
            assert sum(sums) == sum(form.n + (form.rank**2 if optimizer == "trion" else 0) for form in forms)
            assert len(step) == len(gathers) + len(sums)


def test_a_small_workspace_makes_more_waves_and_the_same_sums() -> None:
    sum_of_n = sum(form.n for form in matrix_forms(OPTIMIZERS["dct_adamw"][1]))
    for calls in run_on_ranks(2, _collectives, "fsdp", 2, "dct_adamw", 1):
        assert len(calls[0]) == 6
        assert sum(elements for _, elements in calls[0]) == sum_of_n
