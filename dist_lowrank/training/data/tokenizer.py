"""Tokenizers: a byte-level BPE trained on the spot, or one from a folder or the hub; and fast encoding with either."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dist_lowrank.training.data.hub import reach_hub

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

# One call encodes about this many characters: enough for all cores, little enough for memory (about 100 bytes each).
_BATCH_CHARACTERS = 4_000_000
_PIECE_CHARACTERS = 1_000_000


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `documents`.

    Any text survives encoding and decoding unchanged. The same documents give the same tokenizer. A small text may
    have fewer than `vocab_size` merges to offer: the vocabulary is then smaller.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, or of a model on the hub. Code that comes with it is never run.

    Raises:
        ValueError: there is none that can be loaded, or it has no end-of-text token; names `data.tokenizer`.
        ConnectionError: it is neither here nor can the hub be reached.
    """
    folder = Path(name).expanduser()
    try:  # in a folder, or downloaded before: `transformers` would ask the hub first, and wait for it
        tokenizer = _from_pretrained(str(folder) if folder.is_dir() else name, local_files_only=True)
    except ValueError:
        if folder.is_dir():
            raise
        reach_hub("data.tokenizer", name, "model")
        tokenizer = _from_pretrained(name, local_files_only=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"data.tokenizer={name!r} has no `eos_token`, which marks the end of a document; set one")
    return tokenizer


def _from_pretrained(name: str, *, local_files_only: bool) -> PreTrainedTokenizerFast:
    allowed = "a folder with a tokenizer.json, or the name of a model on the Hugging Face hub"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local_files_only)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.tokenizer={name!r} cannot be loaded; must be {allowed} ({error})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"data.tokenizer={name!r} is a {type(tokenizer).__name__}; must be {allowed}")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]) -> Iterator[npt.NDArray[np.int64]]:
    """The tokens of each document followed by one end-of-text token: int64 of shape (tokens,), in order."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    pieces = (piece for document in documents for piece in _pieces(document))
    tokens: list[int] = []
    for batch in _batches(pieces):
        encodings = backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        for (_, ends_document), encoding in zip(batch, encodings, strict=True):
            tokens += encoding.ids
            if ends_document:
                yield np.array([*tokens, tokenizer.eos_token_id], dtype=np.int64)
                tokens = []


def _pieces(document: str) -> Iterator[tuple[str, bool]]:
    """Cut a very long document at line ends; the flag says which piece is the last."""
    start = 0
    while len(document) - start > _PIECE_CHARACTERS:
        end = document.rfind("\n", start + 1, start + _PIECE_CHARACTERS) + 1 or start + _PIECE_CHARACTERS
        yield document[start:end], False
        start = end
    yield document[start:], True


def _batches(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    while first := list(islice(pieces, 1)):
        batch, characters = first, len(first[0][0])
        while characters < _BATCH_CHARACTERS and (more := list(islice(pieces, 1))):
            batch += more
            characters += len(more[0][0])
        yield batch
