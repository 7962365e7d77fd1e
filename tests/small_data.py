"""A little text, and data made of it."""

from __future__ import annotations

from pathlib import Path

import torch

from dist_lowrank.config.schema import TextData
from dist_lowrank.training.data import Data, load_data

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


def vars_of(config: TextData) -> dict:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def write_prose(folder: Path) -> Path:
    """Twenty files; returns the folder."""
    for number in range(20):
        (folder / f"{number:02d}.txt").write_text(prose(400, seed=number))
    return folder
