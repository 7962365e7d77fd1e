"""Indexed data: batches that no layout of ranks changes, and the cache."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import run_on_ranks
from small_data import load, prose, vars_of

from dist_lowrank.config.schema import TextData
from dist_lowrank.training.data.sample_order import sample_index

# --- Batches ---


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("micro_batch_size", "workers"), [(1, 0), (5, 0), (12, 0), (5, 2)])
def test_ranks_together_read_the_next_samples_of_the_global_order(text_config, world_size, micro_batch_size, workers):
    config = TextData(**{**vars_of(text_config), "workers": workers})
    ranks = [
        load(config, seed=7, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size).train
        for rank in range(world_size)
    ]
    blocks = ranks[0].blocks
    for step in range(3):
        micro_batches = [rank.next_batch() for rank in ranks]
        for batch in micro_batches:
            sizes = [len(part) for part in batch]
            assert sum(sizes) == 12 // world_size
            assert all(size == micro_batch_size for size in sizes[:-1])
            assert sizes[-1] <= micro_batch_size
            assert all(part.dtype == torch.int64 and part.shape[1] == 16 for part in batch)
        union = torch.cat([part for batch in micro_batches for part in batch])
        order = sample_index(range(12 * step, 12 * step + 12), len(blocks), 7)
        assert torch.equal(union, blocks.__getitems__(order.tolist()))


def test_an_epoch_has_each_block_once_though_batches_do_not_divide_it(text_config):
    train = load(text_config, global_batch_size=7).train
    blocks = train.blocks
    assert len(blocks) % 7
    read = torch.cat([part for _ in range(2 * len(blocks) // 7 + 1) for part in train.next_batch()])
    every = sorted(blocks.__getitems__(range(len(blocks))).tolist())
    first, second = read[: len(blocks)].tolist(), read[len(blocks) : 2 * len(blocks)].tolist()
    assert sorted(first) == every
    assert sorted(second) == every
    assert first != second
    assert train.epoch == pytest.approx(len(read) / len(blocks))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_on_another_number_of_ranks_from_one_integer(text_config, workers):
    config = TextData(**{**vars_of(text_config), "workers": workers})
    unbroken = load(config).train
    for _ in range(3):
        unbroken.next_batch()
    state = json.loads(json.dumps(unbroken.state_dict()))
    assert state == {"samples": 36}
    ranks = [load(config, rank=rank, world_size=2).train for rank in range(2)]
    for rank in ranks:
        rank.next_batch()  # so that workers, if any, have read ahead
        rank.load_state_dict(state)
    for _ in range(2):
        resumed = torch.cat([part for rank in ranks for part in rank.next_batch()])
        assert torch.equal(resumed, torch.cat(unbroken.next_batch()))
    assert [rank.state_dict() for rank in ranks] == [{"samples": 60}] * 2


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_random_state_alone(text_config, workers):
    before = torch.get_rng_state()
    load(TextData(**{**vars_of(text_config), "workers": workers})).train.next_batch()
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_end_with_the_batches_that_they_served(text_config):
    train = load(TextData(**{**vars_of(text_config), "workers": 2})).train
    train.next_batch()
    assert len(multiprocessing.active_children()) == 2
    start = time.perf_counter()
    del train
    assert multiprocessing.active_children() == []
    assert time.perf_counter() - start < 4  # torch gives a worker that does not hear the end 5 seconds


def test_validation_is_a_sequence_of_blocks(text_config):
    validation = load(text_config).validation
    assert validation[0].shape == (16,)
    assert validation[0].dtype == torch.int64
    assert torch.equal(validation[-1], validation[len(validation) - 1])
    assert len(list(validation)) == len(validation)
    with pytest.raises(IndexError):
        validation[len(validation)]


# --- The cache ---


def test_ranks_that_start_together_build_the_cache_once(text_folder, tmp_path):
    config = TextData(source="text", path=str(text_folder), sequence_length=16, cache=str(tmp_path))

    def rank_main(rank: int) -> tuple[int, torch.Tensor]:
        data = load(config, rank=rank, world_size=4)
        return next(tmp_path.glob("*/train.arrow")).stat().st_ino, torch.cat(data.train.next_batch())

    results = run_on_ranks(4, rank_main, distributed=False)
    assert len({inode for inode, _ in results}) == 1
    assert torch.equal(torch.cat([batch for _, batch in results]), torch.cat(load(config).train.next_batch()))
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_a_cache_whose_building_was_killed_is_not_used(tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("\n".join(prose(20_000, seed=number) for number in range(10)))
    config = TextData(source="text", path=str(text), sequence_length=16, cache=str(tmp_path / "cache"))
    builder = os.fork()
    if builder == 0:
        load(config)
        os._exit(0)
    while not (left_over := list(tmp_path.glob("cache/*.partial/validation.arrow"))):
        assert os.waitpid(builder, os.WNOHANG) == (0, 0), "it ended before it could be killed"
        time.sleep(0.001)
    os.kill(builder, signal.SIGKILL)
    assert os.waitpid(builder, 0)[1] == signal.SIGKILL
    assert left_over[0].exists()
    data = load(config)
    assert not list(tmp_path.glob("cache/*.partial"))
    assert len(data.train.blocks) > 10 * 20_000 / 16 / 4


@pytest.mark.parametrize("change", [{"sequence_length": 32}, {"vocab_size": 310}, {"validation_fraction": 0.2}])
def test_what_changes_the_blocks_changes_the_cache_folder(text_config, change):
    def folders() -> set[str]:
        return {path.name for path in Path(text_config.cache).iterdir() if path.is_dir()}

    load(text_config)
    before = folders()
    load(TextData(**{**vars_of(text_config), **change}))
    assert len(folders() - before) == 1


def test_changed_text_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text(prose(500, seed=1))
    config = TextData(source="text", path=str(tmp_path / "a.txt"), sequence_length=8, cache=str(tmp_path / "cache"))
    first = load(config).validation[0]
    (tmp_path / "a.txt").write_text(prose(500, seed=2))
    assert not torch.equal(load(config).validation[0], first)


def test_a_cache_that_cannot_be_written_is_named(text_folder, tmp_path):
    (tmp_path / "file").touch()
    config = TextData(source="text", path=str(text_folder), cache=str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"data\.cache=.*file/cache"):
        load(config)


def test_a_part_shorter_than_one_block_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(prose(300, seed=0))
    config = TextData(source="text", path=str(tmp_path), sequence_length=128, cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"data\.sequence_length=128: the validation set is shorter than one block"):
        load(config)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    with pytest.raises(ValueError, match=r"data\.sequence_length=1: must be at least 2"):
        load(TextData(**{**vars_of(config), "sequence_length": 1}))
