"""Shards to safetensors files and back, through torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dist_lowrank.checkpoint.errors import CheckpointError
from dist_lowrank.checkpoint.shards import Shard

_FILE_BYTES = 2**31  # about; a file is put together in memory


def write_shards(
    folder: Path, parts: Mapping[str, Shard], totals_bytes: Mapping[str, int], group: dist.ProcessGroup
) -> None:
    """Writes this rank's parts, on the CPU, each element of the global tensors on one rank. Collective.

    Args:
        totals_bytes: of every tensor that any rank writes; the same on all ranks.

    Raises:
        CheckpointError: on every rank, if any could not.
    """
    numbers, number, filled = {}, 1, 0.0
    for name, size in sorted(totals_bytes.items()):
        share_bytes = size / dist.get_world_size(group)
        if filled and filled + share_bytes > _FILE_BYTES:
            number, filled = number + 1, 0.0
        numbers[name], filled = number, filled + share_bytes
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=numbers, save_distributed=True)
    with _errors_of_ours():
        dcp_save(dict(parts), storage_writer=writer, planner=_SavePlanner(), process_group=group)


def read_shards(folder: Path, shards: Mapping[str, Shard], group: dist.ProcessGroup) -> None:
    """Fills the tensors of shards, which may overlap between ranks, from whatever blocks were saved. Collective.

    The files must have been verified: all blocks there, of the right dtype.

    Raises:
        CheckpointError: on every rank, if any could not; then tensors are partly filled.
    """
    wanted = {name: shard for name, shard in shards.items() if shard.tensor.numel()}
    with torch.no_grad(), _errors_of_ours():
        dcp_load(
            dict(wanted),
            storage_reader=HuggingFaceStorageReader(str(folder)),
            planner=_LoadPlanner(),
            process_group=group,
        )


@contextmanager
def _errors_of_ours() -> Iterator[None]:
    """torch's exception is no `Exception`: it would end a thread in silence, past all who clean up or report."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise CheckpointError(f"{type(cause).__name__}: {cause} (rank {rank})") from error


def _chunk(shard: Shard) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(shard.offset), shard.tensor.shape)


class _SavePlanner(DefaultSavePlanner):
    """Of shards instead of DTensors, which would have to live on a device mesh of the CPU."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(name, shard) for name, shard in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].tensor

    @staticmethod
    def _item(name: str, shard: Shard) -> WriteItem:
        properties = TensorProperties.create_from_tensor(shard.tensor)
        data = TensorWriteData(_chunk(shard), properties, torch.Size(shard.shape))
        return WriteItem(MetadataIndex(name, torch.Size(shard.offset)), WriteItemType.SHARD, tensor_data=data)


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved: Mapping[str, Any] = self.metadata.state_dict_metadata
        items = [
            item
            for name, shard in self.state_dict.items()
            for item in create_read_items_for_chunk_list(name, saved[name], [_chunk(shard)])
        ]
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        tensor: Tensor = self.state_dict[index.fqn].tensor
        return tensor
