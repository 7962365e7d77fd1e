"""DCTAdamW with accelerate, which wraps the model and may replace its parameters after the optimizer was made.

    accelerate launch --cpu --num_processes 2 examples/with_accelerate.py       # or torchrun --nproc-per-node 2
    accelerate launch --num_processes 2 examples/with_accelerate.py --fsdp      # FSDP2, on GPUs

Any number of processes prints the same losses. On a CPU accelerate knows only DDP: it ignores an FSDP plugin there.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dist_lowrank.optim import DCTAdamW, full_state_dict, param_groups

STEPS, BATCH, TOKENS, VOCABULARY = 12, 8, 16, 64


def sequences() -> list[torch.Tensor]:
    """Token x is followed by 3x + 1."""
    first = torch.randint(VOCABULARY, (STEPS * BATCH,), generator=torch.Generator().manual_seed(0))
    tokens = [first]
    for _ in range(TOKENS - 1):
        tokens.append((3 * tokens[-1] + 1) % VOCABULARY)
    return list(torch.stack(tokens, dim=1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--save", help="a file for the optimizer's state")
    arguments = parser.parse_args()
    on_cpu = not torch.cuda.is_available()
    if arguments.fsdp and on_cpu:
        parser.error("--fsdp: accelerate shards on GPUs only; on a CPU it would silently use DDP")

    plugin = None
    if arguments.fsdp:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[LlamaDecoderLayer.__name__],
        )
    accelerator = Accelerator(cpu=on_cpu, fsdp_plugin=plugin, gradient_accumulation_steps=2)

    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=88,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=False,
        )
    )
    # Made before `prepare`, as accelerate wants it: the sharding is read from the parameters at the first step.
    # FSDP2's default cuts all matrices along dimension 0; wide ones, which compress that axis, are exchanged then.
    optimizer = DCTAdamW(param_groups(model), lr=0.01, rank=0.25)
    micro_batch = BATCH // accelerator.num_processes // accelerator.gradient_accumulation_steps
    loader = DataLoader(sequences(), batch_size=micro_batch)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # Not prepared: accelerate would step a prepared scheduler once per process.
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    total, step = torch.zeros((), device=accelerator.device), 0
    for tokens in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            total += loss.detach() / accelerator.gradient_accumulation_steps
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            scheduler.step()
            step += 1
            mean = accelerator.reduce(total, reduction="mean")
            accelerator.print(f"step {step} loss {mean.item():.6f}", flush=True)
            total = torch.zeros_like(total)

    if arguments.save:
        # Every rank holds a part, also under DDP, so gather first: `accelerator.save_state` would write rank 0's alone.
        state = full_state_dict(optimizer)
        accelerator.save(state, arguments.save)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort a process that ends by the usual way


if __name__ == "__main__":
    main()
