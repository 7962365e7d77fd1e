"""DCTAdamW under FSDP2 in a loop of one's own; needs torch alone.

    torchrun --nproc-per-node 2 examples/bare_loop.py
    torchrun --nproc-per-node 1 examples/bare_loop.py --steps 10 --save somewhere
    torchrun --nproc-per-node 2 examples/bare_loop.py --load somewhere                # goes on from step 10

Any number of processes prints the same losses, also a run that goes on with another number than saved.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from dist_lowrank.optim import DCTAdamW, param_groups

VOCABULARY, WIDTH, BATCH, TOKENS, SCHEDULE_STEPS = 64, 32, 8, 16, 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)  # tall: 128 x 32
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)  # wide: 32 x 128

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def batch(step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's share of a global batch: inputs and the tokens that follow, where x is followed by 3x + 1."""
    first = torch.randint(VOCABULARY, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    tokens = [first]
    for _ in range(TOKENS):
        tokens.append((3 * tokens[-1] + 1) % VOCABULARY)
    mine = torch.cat(tokens, dim=1).to(device).chunk(dist.get_world_size())[dist.get_rank()]
    return mine[:, :-1], mine[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=SCHEDULE_STEPS)
    parser.add_argument("--load", help="folder of a checkpoint to go on from")
    parser.add_argument("--save", help="folder for a checkpoint of the end")
    arguments = parser.parse_args()

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = dist.get_world_size()

    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), Block(), Block(), head).to(device)

    # A wide matrix is cut along dimension 1, where it divides: its rows in tall form (its columns) stay whole, and no
    # rows are exchanged. The rest is cut along dimension 0, FSDP's default.
    def placement(parameter: nn.Parameter) -> Shard:
        wide = parameter.ndim == 2 and parameter.shape[0] < parameter.shape[1]
        return Shard(1) if wide and parameter.shape[1] % ranks == 0 else Shard(0)

    mesh = init_device_mesh(device.type, (ranks,))
    for block in model[1:3]:
        fully_shard(block, mesh=mesh, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)

    # The blocks' matrices take the low-rank path. Embeddings, norms, and a head that has no name of its own: AdamW.
    optimizer = DCTAdamW(param_groups(model, dense=["3.weight"]), lr=0.01, rank=0.25)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, SCHEDULE_STEPS)

    def snapshot() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}

    first_step = 0
    if arguments.load:
        state = snapshot()
        dcp.load(state, checkpoint_id=arguments.load)  # re-shards
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        first_step = scheduler.last_epoch

    for step in range(first_step, arguments.steps):
        inputs, targets = batch(step, device)
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step + 1} loss {mean.item():.6f}", flush=True)

    if arguments.save:
        dcp.save(snapshot(), checkpoint_id=arguments.save)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort a process that ends by the usual way


if __name__ == "__main__":
    main()
