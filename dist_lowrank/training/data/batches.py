"""Training batches: what every source offers, and the batches of indexed data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from dist_lowrank.training.data.packing import Blocks
from dist_lowrank.training.data.sample_order import sample_index


class Batches(Protocol):
    """An endless supply of one rank's training batches, whose position can be saved."""

    @property
    def epoch(self) -> float:
        """How often the data has been read, for display."""

    def next_batch(self) -> list[torch.Tensor]:
        """This rank's micro-batches of the next optimizer step, each int64 of shape (b, sequence_length)."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last `next_batch`, as plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` gave."""


class IndexedBatches:
    """Batches of data with an index, in the order of `sample_index`.

    The position is one integer, the number of samples that all ranks together have consumed. An optimizer step takes
    the next `global_batch_size` samples of the global order, a consecutive part of them for each rank; so neither
    the number of ranks, nor of workers, nor the micro-batch size changes which samples make up a step.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        seed: int,
        rank: int,
        world_size: int,
        global_batch_size: int,
        micro_batch_size: int,
        workers: int = 0,
    ) -> None:
        self.blocks = blocks
        self._seed = seed
        self._rank = rank
        self._global_batch_size = global_batch_size
        self._rank_batch_size = global_batch_size // world_size
        self._micro_batch_size = micro_batch_size
        self._workers = workers
        self._samples = 0
        self._iterator: Iterator[torch.Tensor] | None = None

    @property
    def epoch(self) -> float:
        return self._samples / len(self.blocks)

    def next_batch(self) -> list[torch.Tensor]:
        if self._iterator is None:
            self._iterator = self._read_from(self._samples)
        batch = next(self._iterator)  # (rank_batch_size, sequence_length)
        self._samples += self._global_batch_size
        return list(torch.split(batch, self._micro_batch_size))

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self._samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._samples = int(state["samples"])
        self._iterator = None  # and with it whatever the workers have read ahead

    def _read_from(self, samples: int) -> Iterator[torch.Tensor]:
        indices = _indices(
            samples + self._rank * self._rank_batch_size,
            count=self._rank_batch_size,
            stride=self._global_batch_size,
            length=len(self.blocks),
            seed=self._seed,
        )
        loader = DataLoader(
            self.blocks,
            batch_sampler=indices,  # type: ignore[arg-type]  # an endless one has no length
            collate_fn=_as_read,
            num_workers=self._workers,
            generator=torch.Generator(),  # else the loader draws from the global one, and dropout would notice
        )
        return iter(loader)


def _indices(position: int, *, count: int, stride: int, length: int, seed: int) -> Iterator[list[int]]:
    # A function and no method: a cycle through `self` would leave the end of the workers to the garbage collector,
    # which finalizes their queues first, so that each would have to be waited for and killed.
    while True:
        yield sample_index(np.arange(position, position + count), length, seed).tolist()
        position += stride


def _as_read(batch: Any) -> Any:
    return batch  # `Blocks` has put it together
