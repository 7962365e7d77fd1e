"""Text for training: from a corpus that is installed, the user's files, or the hub; as batches of token blocks.

    data = load_data(config.data, seed=config.seed, rank=rank, world_size=world_size, ...)
    for micro_batch in data.train.next_batch(): ...

This module imports no heavy library before it is known that there is something to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dist_lowrank.config.schema import CorpusData, HubData, TextData
from dist_lowrank.training.data.corpus import check_corpus, open_corpus

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from dist_lowrank.training.data.batches import Batches

__all__ = ["Data", "HeldOut", "check_data", "load_data"]


class HeldOut(Protocol):
    """Blocks for validation, the same on all ranks: `len()`, and each int64 of shape (sequence_length,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Data:
    """What a run trains on and is measured on."""

    tokenizer: PreTrainedTokenizerFast
    train: Batches
    validation: HeldOut
    unigram_loss: float | None  # nats per validation target of a smoothed unigram model; None for streams


def check_data(config: CorpusData | TextData | HubData) -> None:
    """Raise now, before any process starts, what `load_data` would raise for data that is not there."""
    if isinstance(config, HubData):
        from dist_lowrank.training.data.hub import check_hub

        check_hub(config)
    else:
        check_corpus(config)


def load_data(
    config: CorpusData | TextData | HubData,
    *,
    seed: int,
    rank: int,
    world_size: int,
    global_batch_size: int,
    micro_batch_size: int,
) -> Data:
    """Open the data of a run on one rank. No collective: ranks on one machine share the cache through a file lock.

    Args:
        config: the `data` group.
        seed: of the sample order.
        rank: of this process, below `world_size`.
        world_size: number of ranks that share each batch.
        global_batch_size: samples of an optimizer step over all ranks, a multiple of `world_size`.
        micro_batch_size: most samples in one tensor of `next_batch`.

    Raises:
        ValueError: a path, year, tokenizer, data set or length that cannot be used; names the key and the value.
        ConnectionError: the hub cannot be reached.
    """
    if config.sequence_length < 2:
        raise ValueError(f"data.sequence_length={config.sequence_length}: must be at least 2, a token and its target")
    check_data(config)
    if isinstance(config, HubData):
        return _load_stream(config, seed, rank, world_size, global_batch_size, micro_batch_size)

    from dist_lowrank.training.data.batches import IndexedBatches
    from dist_lowrank.training.data.cache import packed_corpus

    corpus = packed_corpus(open_corpus(config, warn=rank == 0), config)
    train = IndexedBatches(
        corpus.train,
        seed=seed,
        rank=rank,
        world_size=world_size,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        workers=config.workers,
    )
    return Data(corpus.tokenizer, train, corpus.validation, corpus.unigram_loss)


def _load_stream(
    config: HubData, seed: int, rank: int, world_size: int, global_batch_size: int, micro_batch_size: int
) -> Data:
    from dist_lowrank.training.data.hub import open_hub
    from dist_lowrank.training.data.streaming import StreamBatches, held_out_blocks
    from dist_lowrank.training.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer)
    streams = open_hub(config, rank=rank, world_size=world_size)
    train = StreamBatches(
        streams.open_stream,
        tokenizer,
        config,
        seed=seed,
        rank=rank,
        world_size=world_size,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
    )
    return Data(tokenizer, train, held_out_blocks(streams.held_out, tokenizer, config), unigram_loss=None)
