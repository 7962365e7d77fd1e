"""What operands of bfloat16 (`transform_precision=bf16`) change: the chosen columns, their energy, and the loss.

    python benchmarks/operand_precision.py [--steps 100] [--hidden 256] [--threads 1]

A small LLaMA over characters (see language_model.py) trains with DCT-AdamW, by operands of float32 and of bfloat16. In
the last steps of the first run, columns are also chosen by bfloat16 operands from the same gradients, and it is told
how much less of the energy they hold, how many of them are others, and how far the direction that bfloat16 operands
lift from the same coefficients is from the exact one.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

import torch
from language_model import BATCH, LENGTH, batches, read_text, validation_loss
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dist_lowrank.dictionaries import Dictionary
from dist_lowrank.optim import DCTAdamW, param_groups
from dist_lowrank.subspaces import column_scores, top_columns

WATCHED = 5  # of the last steps


def compared(gradient: Tensor) -> tuple[float, float, float]:
    """Energy lost, columns that differ, distance of what is lifted; each as a share."""
    tall = gradient if gradient.shape[0] >= gradient.shape[1] else gradient.t()
    n, device = tall.shape[1], tall.device
    wide, narrow = (Dictionary("dct2", n, dtype=torch.float32, device=device, precision=p) for p in ("fp32", "bf16"))
    scores = column_scores(wide.transform(tall))
    exact, other = (top_columns(each, n // 4) for each in (scores, column_scores(narrow.transform(tall))))
    coefficients = wide.project(tall, exact)
    lifted = [torch.zeros(tall.shape) for _ in range(2)]
    for dictionary, target in zip((wide, narrow), lifted, strict=True):
        dictionary.add_lifted(target, coefficients, exact, decay=1.0, scale=1.0)
    lost = 1 - float(scores[other].sum() / scores[exact].sum())
    changed = float((~torch.isin(other, exact)).float().mean())
    return lost, changed, float((lifted[1] - lifted[0]).norm() / lifted[0].norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = read_text(None)
    shape: dict[str, Any] = {"hidden_size": options.hidden, "intermediate_size": 11 * options.hidden // 4}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        more = {"vocab_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False}
        model = LlamaForCausalLM(LlamaConfig(**shape, **more, max_position_embeddings=LENGTH))
        optimizer = DCTAdamW(param_groups(model), lr=4e-3, transform_precision=precision)
        found = []
        for step, tokens in enumerate(itertools.islice(batches(text[0], 0), options.steps)):
            model(input_ids=tokens, labels=tokens).loss.backward()
            if precision == "fp32" and step >= options.steps - WATCHED:
                found += [compared(p.grad) for _, p in param_groups(model)[0]["params"]]
            optimizer.step()
            optimizer.zero_grad()
        print(f"{precision}: validation loss {validation_loss(model, text[1]):.4f} after {options.steps} x {BATCH}")
        for name, shares in zip(
            ("energy lost", "columns that differ", "lift off by"), zip(*found, strict=True), strict=False
        ):
            print(f"  {name}: mean {statistics.mean(shares):.1e}, at most {max(shares):.1e}")


if __name__ == "__main__":
    main()
