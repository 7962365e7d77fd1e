"""However late the ranks of a launch come: one run folder, and the same configuration on all of them."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import numpy
import pytest
from processes import run_on_ranks
from small_runs import overrides_for
from torch.distributed import PrefixStore, TCPStore

from dist_lowrank import worker
from dist_lowrank.config import digest

RANKS = 3


def _rank(rank: int, port: int, delays_seconds: list[float], overrides: list[str]) -> tuple[str, str]:
    """What a rank of `main_torchrun` agrees on with the others; returns the attempt's folder and the digest."""
    time.sleep(delays_seconds[rank])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    server = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    store = PrefixStore("launch", server)
    config, folder = worker._agree(store, lambda world, before: worker._prepare(overrides, world, before))
    return str(folder.attempt_path), digest(config)


@pytest.mark.parametrize("launches", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_staggered_ranks_share_one_folder_and_one_digest(tmp_path: Path, text: str, launches: int) -> None:
    overrides = overrides_for(
        text, tmp_path / "runs", "resume=none", "train.global_batch_size=6", "launcher.device=cpu"
    )
    found = []
    for launch in range(launches):
        delays_seconds = numpy.random.default_rng(launch).uniform(0, 0.4, RANKS).tolist()
        agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        results = run_on_ranks(RANKS, _rank, agent.port, delays_seconds, overrides, distributed=False)
        assert len(set(results)) == 1, f"launch {launch}: {results}"
        found.append(results[0])
    folders = sorted(str(path / "attempt-1") for path in (tmp_path / "runs").iterdir() if path.name != "cache")
    assert sorted(path for path, _ in found) == folders
    assert len(folders) == launches
    assert len({each for _, each in found}) == 1
