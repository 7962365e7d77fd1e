"""Batches of streamed documents: shuffled in blocks, packed on the fly, exactly resumable.

The shuffle buffer of `datasets` loses its content on resume. Here a block of `shuffle_buffer` documents is read and
permuted under a key made of (seed, rank, epoch, number of the block). A block can so be read again, and the state is
small: where its reading began, how many of its documents have been used, and the tokens left over from the last one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerFast

from dist_lowrank.config.schema import HubData
from dist_lowrank.training.data.hub import text_of_row
from dist_lowrank.training.data.packing import pack, pad
from dist_lowrank.training.data.sample_order import shuffled
from dist_lowrank.training.data.tokenizer import encode

_DOCUMENTS_PER_ENCODING = 256


def held_out_blocks(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, config: HubData) -> torch.Tensor:
    """Held-out documents as blocks: int64 of shape (blocks, sequence_length), at least one block."""
    encoded, length = encode(tokenizer, documents), config.sequence_length
    parts = pack(encoded, length) if config.packing else (pad(each, length)[None] for each in encoded if _says(each))
    blocks = [torch.from_numpy(part) for part in parts]
    if not blocks:
        raise ValueError(
            f"data.validation_documents={config.validation_documents}: the validation set is shorter than one block of "
            f"data.sequence_length={config.sequence_length} tokens; must be more documents or shorter blocks"
        )
    return torch.cat(blocks)


def _says(document: npt.NDArray[np.int64]) -> bool:
    """Whether it has a token to predict; the first has nothing before it."""
    return len(document) > 1


class StreamBatches:
    """This rank's batches of an endless shuffled read of a stream of documents."""

    def __init__(
        self,
        open_stream: Callable[[], datasets.IterableDataset],
        tokenizer: PreTrainedTokenizerFast,
        config: HubData,
        *,
        seed: int,
        rank: int,
        world_size: int,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        """Args: `open_stream` gives this rank's part of the data from its beginning; the rest as for `load_data`."""
        self._open_stream = open_stream
        self._tokenizer = tokenizer
        self._config = config
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._rank_batch_size = global_batch_size // world_size
        self._micro_batch_size = micro_batch_size
        self._left_over = np.empty(0, dtype=np.int64)
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._stream = self._open_stream()
        self._rows = iter(self._stream)
        self._block = -1  # number of the current block in this epoch; -1 before the first
        self._block_start: dict[str, Any] | None = None  # state of the stream where the block begins; null: fresh
        self._next_start: dict[str, Any] | None = None  # the same for the block after it
        self._documents: list[str] = []  # of the block, permuted
        self._encoded: deque[npt.NDArray[np.int64]] = deque()  # the next documents, tokenised
        self._used = 0  # documents of the block that have been packed

    @property
    def epoch(self) -> float:
        return float(self._epoch)

    def next_batch(self) -> list[torch.Tensor]:
        rows = [self._next_sequence() for _ in range(self._rank_batch_size)]
        batch = torch.from_numpy(np.stack(rows))  # (rank_batch_size, sequence_length)
        return list(torch.split(batch, self._micro_batch_size))

    def state_dict(self) -> dict[str, Any]:
        return {
            "rank": self._rank,
            "world_size": self._world_size,
            "epoch": self._epoch,
            "block": self._block,
            "block_start": self._block_start,
            "documents_used": self._used,
            "left_over_tokens": self._left_over.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same rank of the same number of ranks.

        Raises:
            ValueError: the state belongs to another rank or number of ranks.
        """
        saved = (state["rank"], state["world_size"])
        if saved != (self._rank, self._world_size):
            raise ValueError(
                f"the state of a stream belongs to rank {saved[0]} of {saved[1]}, this is rank {self._rank} of "
                f"{self._world_size}: continue a run on streamed data with the number of ranks that it had"
            )
        self._start_epoch(state["epoch"])
        self._left_over = np.array(state["left_over_tokens"], dtype=np.int64)
        if state["block"] < 0:  # nothing of this epoch had been read
            return
        if state["block_start"] is not None:
            self._stream.load_state_dict(state["block_start"])
            self._rows = iter(self._stream)
        self._block, self._next_start = state["block"] - 1, state["block_start"]
        self._read_block()
        self._used = state["documents_used"]

    def _next_sequence(self) -> npt.NDArray[np.int64]:
        length = self._config.sequence_length
        if not self._config.packing:
            while not _says(document := self._next_document()):
                pass
            return pad(document, length)
        if len(self._left_over) < length:
            parts, tokens = [self._left_over], len(self._left_over)
            while tokens < length:
                parts.append(self._next_document())
                tokens += len(parts[-1])
            self._left_over = np.concatenate(parts)
        sequence, self._left_over = self._left_over[:length], self._left_over[length:]
        return sequence

    def _next_document(self) -> npt.NDArray[np.int64]:
        while self._used == len(self._documents):
            self._read_block()
        if not self._encoded:
            upcoming = self._documents[self._used : self._used + _DOCUMENTS_PER_ENCODING]
            self._encoded.extend(encode(self._tokenizer, upcoming))
        self._used += 1
        return self._encoded.popleft()

    def _read_block(self) -> None:
        """Read and permute the next block; where there is none, start the next epoch."""
        column = self._config.text_column
        texts = [text_of_row(row, column) for row in islice(self._rows, self._config.shuffle_buffer)]
        if not texts:
            if self._block < 0:
                raise ValueError(
                    f"data.dataset={self._config.dataset!r} has no training document for rank {self._rank} of "
                    f"{self._world_size}: use fewer ranks, or a smaller data.validation_documents "
                    f"(now {self._config.validation_documents})"
                )
            self._start_epoch(self._epoch + 1)
            return
        self._block += 1
        self._block_start, self._next_start = self._next_start, self._stream.state_dict()
        order = shuffled(len(texts), self._seed, self._rank, self._epoch, self._block)
        self._documents = [texts[index] for index in order]
        self._encoded.clear()
        self._used = 0
