"""Pack tokens of documents into blocks of one length, and keep blocks as memory-mapped Arrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import torch

IGNORED = -100  # where there is no token; torch's cross-entropy does not count it as a target
_TOKENS_PER_WRITE = 1 << 20


def pack(documents: Iterable[npt.NDArray[np.int64]], sequence_length: int) -> Iterator[npt.NDArray[np.int64]]:
    """Concatenate documents and cut: arrays of shape (blocks, sequence_length). The last few tokens are dropped."""
    waiting: list[npt.NDArray[np.int64]] = []
    tokens = 0
    for document in documents:
        waiting.append(document)
        tokens += len(document)
        if tokens >= max(_TOKENS_PER_WRITE, sequence_length):
            joined = np.concatenate(waiting)
            whole = tokens - tokens % sequence_length
            yield joined[:whole].reshape(-1, sequence_length)
            waiting, tokens = [joined[whole:]], tokens - whole
    if tokens >= sequence_length:
        joined = np.concatenate(waiting)[: tokens - tokens % sequence_length]
        yield joined.reshape(-1, sequence_length)


def pad(document: npt.NDArray[np.int64], sequence_length: int) -> npt.NDArray[np.int64]:
    """One document as a block, (sequence_length,): filled up with `IGNORED`, or cut, but for its end-of-text token."""
    block = np.full(sequence_length, IGNORED, dtype=np.int64)
    if len(document) > sequence_length:
        document = np.append(document[: sequence_length - 1], document[-1])
    block[: len(document)] = document
    return block


def write_blocks(
    file: Path, blocks: Iterable[npt.NDArray[np.int64]], sequence_length: int, vocab_size: int
) -> npt.NDArray[np.int64]:
    """Write blocks to an Arrow file in the narrowest unsigned integer that holds the vocabulary.

    Returns:
        How often each token occurs as a target, that is anywhere but first in a block, and how often it occurs first:
        int64 of shape (2, vocab_size), rows in that order.
    """
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    schema = pa.schema([("tokens", pa.list_(pa.from_numpy_dtype(dtype), sequence_length))])
    counts = np.zeros((2, vocab_size), dtype=np.int64)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for part in blocks:
            counts[0] += np.bincount(part[:, 1:].reshape(-1), minlength=vocab_size)
            counts[1] += np.bincount(part[:, 0], minlength=vocab_size)
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.astype(dtype).reshape(-1)), sequence_length)
            writer.write_batch(pa.record_batch([column], schema=schema))
    return counts


class Blocks(torch.utils.data.Dataset[torch.Tensor]):
    """Blocks of tokens in an Arrow file, memory-mapped by `datasets`; each is int64 of shape (sequence_length,)."""

    def __init__(self, file: Path) -> None:
        self._dataset = datasets.Dataset.from_file(str(file)).with_format("numpy")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """Several blocks at once, as a DataLoader asks for them: int64 of shape (len(indices), sequence_length)."""
        tokens = self._dataset[list(indices)]["tokens"]  # (len(indices), sequence_length), of the file's dtype
        return torch.from_numpy(np.asarray(tokens).astype(np.int64))
