"""How long training waits for a checkpoint: asynchronous against synchronous saves, side by side.

    python benchmarks/checkpoint.py [--model llama_60m] [--strategy fsdp] [--optimizer dct_adamw] [--processes 2]

Both write, sync to the disk, open again and compare, take checksums and rename. The two take turns, with training steps
in between, so that a busy moment of the machine hits both; the first save of each warms up and is left out. Shown are
medians: what training waits for each, their ratio, and how a step fares while the thread writes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dist_lowrank.checkpoint import Saver, Sidecar
from dist_lowrank.checkpoint.manifest import FORMAT
from dist_lowrank.checkpoint.random_state import random_state
from dist_lowrank.checkpoint.saver import Saved
from dist_lowrank.config import RunConfig, compose, digest, to_dict
from dist_lowrank.training.checkpoints import all_finite
from dist_lowrank.training.evaluate import next_token_loss
from dist_lowrank.training.model import build_model
from dist_lowrank.training.strategy import make_strategy

TOKENS = 32  # of a training step and rank


def measure(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(options.threads)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(options.processes), DS_ACCELERATOR="cpu")
    store = dist.FileStore(f"{folder}/store", options.processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.processes)
    config = compose([f"model={options.model}", f"strategy={options.strategy}", f"optimizer={options.optimizer}"])
    torch.manual_seed(0)
    model = build_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    strategy = make_strategy(config, model, torch.device("cpu"))
    state = strategy.state()
    tokens = torch.randint(0, 1000, (1, TOKENS))

    def step() -> float:
        started = time.perf_counter()
        strategy.backward(next_token_loss(strategy.model, tokens), last=True)
        strategy.prepare()
        strategy.step(skip=False)
        return time.perf_counter() - started

    reports: dict[bool, list[Saved]] = {True: [], False: []}
    savers = {
        mode: Saver(Path(folder) / str(mode), asynchronous=mode, keep_last=1, report=reports[mode].append)
        for mode in reports
    }
    waited: dict[bool, list[float]] = {True: [], False: []}
    undisturbed, disturbed = [], []
    step()
    for number in range(options.repeats + 1):
        for mode, saver in savers.items():
            dist.barrier()
            started = time.perf_counter()
            shards = state.to_save()
            assert all_finite(shards)  # as a run does
            saver.save(shards, random_state(torch.device("cpu")), _sidecar(config, number))
            waited[mode].append(time.perf_counter() - started)
            while mode and not reports[mode][number:]:
                disturbed.append(step())
                running = torch.tensor(float(saver._thread is not None and saver._thread.is_alive()))
                dist.all_reduce(running)  # ranks make the same steps
                if not running:
                    saver.wait()
            undisturbed.append(step())
    problems = [saved.problem for saves in reports.values() for saved in saves if saved.problem]
    assert not problems, problems
    if rank == 0:
        size = reports[True][-1].stored_bytes
        synchronous, asynchronous = (statistics.median(waited[mode][1:]) for mode in (False, True))
        in_all = statistics.median(saved.seconds for saved in reports[True][1:])
        print(
            f"{options.model}, {parameters / 1e6:.1f}M parameters, {options.optimizer}, {options.strategy}, "
            f"{options.processes} processes, {size / 1e6:.0f} MB per process\n"
            f"synchronous   training waits {synchronous:6.3f} s  ({_list(waited[False])})\n"
            f"asynchronous  training waits {asynchronous:6.3f} s  ({_list(waited[True])}), on the disk after "
            f"{in_all:.2f} s\n"
            f"ratio         {asynchronous / synchronous:.3f}\n"
            f"a step takes  {statistics.median(undisturbed):.3f} s, and {statistics.median(disturbed):.3f} s while a "
            "checkpoint is written"
        )
    dist.barrier()
    os._exit(0)


def _list(seconds: list[float]) -> str:
    return "first " + ", then ".join([f"{seconds[0]:.3f}", " ".join(f"{each:.3f}" for each in seconds[1:])])


def _sidecar(config: RunConfig, step: int) -> Sidecar:
    return Sidecar(
        format=FORMAT,
        step=step,
        world_size=dist.get_world_size(),
        data=[],
        schedule={},
        progress={},
        config=to_dict(config),
        digest=digest(config),
        versions={},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--strategy", default="fsdp")
    parser.add_argument("--optimizer", default="dct_adamw")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--folder", default=None, help="on the disk to measure; default: the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        mp.start_processes(measure, (options, folder), nprocs=options.processes, start_method="spawn")


if __name__ == "__main__":
    main()
