"""DCTAdamW in the Hugging Face Trainer, with checkpoints that any number of processes continues.

    torchrun --nproc-per-node 2 examples/with_trainer.py --output somewhere               # saves at step 6
    torchrun --nproc-per-node 2 examples/with_trainer.py --output elsewhere --resume somewhere/checkpoint-6

Any number of processes prints the same losses, also a run that is resumed with another number than saved.
(Under FSDP the Trainer refuses `optimizers=`: override `create_optimizer` in a subclass and make it there.)
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from dist_lowrank.optim import DCTAdamW, full_state_dict, param_groups

STEPS, BATCH, TOKENS, VOCABULARY = 10, 8, 16, 64


class SaveWholeOptimizer(TrainerCallback):  # type: ignore[misc]
    """Puts the whole optimizer state into a checkpoint.

    Every rank holds a part of it, also under DDP, but the Trainer saves what rank 0 has, which is refused when loaded.
    """

    def on_save(self, args: Any, state: Any, control: Any, *, optimizer: Any, **rest: Any) -> None:
        whole = full_state_dict(optimizer)  # all ranks take part
        if args.should_save:
            torch.save(whole, os.path.join(args.output_dir, f"checkpoint-{state.global_step}", "optimizer.pt"))


def sequences() -> list[dict[str, torch.Tensor]]:
    """Token x is followed by 3x + 1."""
    first = torch.randint(VOCABULARY, (STEPS * BATCH,), generator=torch.Generator().manual_seed(0))
    tokens = [first]
    for _ in range(TOKENS - 1):
        tokens.append((3 * tokens[-1] + 1) % VOCABULARY)
    return [{"input_ids": sequence, "labels": sequence} for sequence in torch.stack(tokens, dim=1)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", required=True, help="folder for checkpoints")
    parser.add_argument("--resume", help="a checkpoint")
    options = parser.parse_args()

    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        save_steps=6,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
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
    ).to(arguments.device)
    optimizer = DCTAdamW(param_groups(model), lr=0.01, rank=0.25)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=sequences(),
        optimizers=(optimizer, None),  # the Trainer makes the scheduler
        callbacks=[SaveWholeOptimizer()],
    )
    first_step = int(options.resume.rpartition("-")[2]) if options.resume else 0
    trainer.train(resume_from_checkpoint=options.resume)
    if trainer.is_world_process_zero():
        for entry in trainer.state.log_history:
            if "loss" in entry and entry["step"] > first_step:
                print(f"step {entry['step']} loss {float(entry['loss']):.6f}", flush=True)
    trainer.accelerator.end_training()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort a process that ends by the usual way


if __name__ == "__main__":
    main()
