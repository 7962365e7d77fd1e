"""Checkpoints: one format for every strategy, of tensors and JSON alone, that any number of processes can continue.

    runs/RUN/checkpoints/save-0003-step-00000150/
        shard-00001-model-00001-of-00001.safetensors    what rank 0 wrote; open it with `safetensors` alone
        shard-00002-model-00001-of-00001.safetensors
        checkpoint.json                                 step, data position, schedule, configuration, versions, tensors
        manifest.json                                   size and SHA-256 of every other file

Tensors are keyed by the parameter's name and stored as blocks of their global shape. Nothing here reads or writes a
pickle, and nothing that a checkpoint says is executed or followed out of its folder.
"""

from dist_lowrank.checkpoint.errors import CheckpointError
from dist_lowrank.checkpoint.folders import committed, newest_good
from dist_lowrank.checkpoint.manifest import Sidecar, open_checkpoint, verify_files
from dist_lowrank.checkpoint.saver import Saver
from dist_lowrank.checkpoint.shards import Shard, shard_of
from dist_lowrank.checkpoint.state import TrainingState

__all__ = [
    "CheckpointError",
    "Saver",
    "Shard",
    "Sidecar",
    "TrainingState",
    "committed",
    "newest_good",
    "open_checkpoint",
    "shard_of",
    "verify_files",
]
