"""Tokenise and pack a corpus once per machine; afterwards every run and every rank maps the same files.

A folder of the cache is named by a SHA-256 of everything that its content depends on. It is built in a temporary
folder beside it and renamed when complete, under a file lock, so that a folder that exists is always whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from dist_lowrank.config.schema import CorpusData, TextData
from dist_lowrank.training.data.corpus import Corpus
from dist_lowrank.training.data.packing import Blocks, pack, write_blocks
from dist_lowrank.training.data.tokenizer import encode, load_tokenizer, train_tokenizer

_FORMAT = 1  # raise it when the files below change their meaning
_TOKENIZER, _TRAIN, _VALIDATION, _FACTS = "tokenizer", "train.arrow", "validation.arrow", "facts.json"


@dataclass(frozen=True)
class PackedCorpus:
    tokenizer: PreTrainedTokenizerFast
    train: Blocks
    validation: Blocks
    unigram_loss: float  # nats per token, see `unigram_loss`


def packed_corpus(corpus: Corpus, config: CorpusData | TextData) -> PackedCorpus:
    """Load the packed form of `corpus` from the cache; build it first if this process is the first to need it.

    Raises:
        ValueError: a part is shorter than one block, or `data.tokenizer` cannot be used.
        OSError: the cache cannot be written; names `data.cache`.
    """
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer is not None else None
    vocabulary = config.vocab_size if tokenizer is None else _fingerprint(tokenizer)
    key = json.dumps([_FORMAT, corpus.digest, vocabulary, config.sequence_length])
    folder = cache_root(config.cache) / f"{config.source}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    if not folder.exists():
        _build_once(folder, corpus, config, tokenizer)
    if tokenizer is None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / _TOKENIZER)
    facts = json.loads((folder / _FACTS).read_text("utf-8"))
    return PackedCorpus(tokenizer, Blocks(folder / _TRAIN), Blocks(folder / _VALIDATION), facts["unigram_loss"])


def cache_root(configured: str | None) -> Path:
    """`configured`, else `$XDG_CACHE_HOME/dist-lowrank`, else `~/.cache/dist-lowrank`."""
    if configured is not None:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist-lowrank"


def unigram_loss(train_counts: npt.NDArray[np.int64], target_counts: npt.NDArray[np.int64]) -> float:
    """Mean loss in nats on the targets of a model that knows only how often each token occurred in training.

    Add-one smoothing: a token that never occurred counts as seen once. Both arguments have shape (vocab_size,).
    """
    log_probability = np.log(train_counts + 1) - np.log(train_counts.sum() + len(train_counts))
    return -float(target_counts @ log_probability / target_counts.sum())


def _build_once(
    folder: Path, corpus: Corpus, config: CorpusData | TextData, tokenizer: PreTrainedTokenizerFast | None
) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        locked = FileLock(f"{folder}.lock").acquire()
    except OSError as error:
        raise OSError(f"data.cache={config.cache!r}: cannot write to the folder {folder.parent} ({error})") from error
    with locked:
        if folder.exists():  # another process was first
            return
        shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed
        partial.mkdir()
        try:
            _build(partial, corpus, config, tokenizer)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _build(
    folder: Path, corpus: Corpus, config: CorpusData | TextData, tokenizer: PreTrainedTokenizerFast | None
) -> None:
    if tokenizer is None:
        tokenizer = train_tokenizer(corpus.train, config.vocab_size)
        tokenizer.save_pretrained(folder / _TOKENIZER)
    length, vocab_size = config.sequence_length, len(tokenizer)
    counts = {}
    for name, documents in ((_VALIDATION, corpus.validation), (_TRAIN, corpus.train)):
        blocks = pack(encode(tokenizer, documents), length)
        counts[name] = write_blocks(folder / name, blocks, length, vocab_size)
        if not counts[name].any():
            part = "validation set" if name == _VALIDATION else "training set"
            raise ValueError(
                f"data.sequence_length={length}: the {part} is shorter than one block of {length} tokens; "
                "must be at most the number of its tokens (or give it more text)"
            )
    loss = unigram_loss(counts[_TRAIN].sum(axis=0), counts[_VALIDATION][0])
    (folder / _FACTS).write_text(json.dumps({"unigram_loss": loss}), "utf-8")


def _fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    content = f"{tokenizer.backend_tokenizer.to_str()}\0{tokenizer.eos_token_id}"
    return hashlib.sha256(content.encode()).hexdigest()
