"""Compares a learned, shared dictionary with DCT-II, an SVD per matrix and a random dictionary, on a tiny LLaMA.

    python benchmarks/shared_dictionary.py [--steps 400] [--seeds 3] [--threads 1] [--text FILE] [--refresh 50]
        [--only NAME ...]

All with Adam's moments in the subspace, moved when directions change, and with Fira's residual or without any; beside
them AdamW in full. Directions are chosen every `--refresh` steps, shared dictionaries change every 100. Text, model,
schedule and batches are those of `language_model.py`, which is imported. Each contender runs with three learning rates,
and with more as long as the best one is the highest or the lowest; the best one then with the other seeds. Shown are
the validation loss in nats per character, its range over seeds, and of those runs the share of the gradient's energy

- `chosen`: in the directions, at the steps that chose them, but for those that also changed the shared dictionary,
- `later`: in the directions at hand in the middle of every 50 steps, before they may be chosen anew.

A warning, not a verdict: the model is tiny and the runs are short.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from language_model import BATCH, BETAS, LENGTH, Optimizers, adamw, make_model, read_text, run
from torch import Tensor, nn

from dist_lowrank.dictionaries import LearnedDictionary
from dist_lowrank.optim import param_groups
from dist_lowrank.optim.projected_adam import ProjectedAdam
from dist_lowrank.optim.rounding import RandomBits
from dist_lowrank.optim.wave import place_of

ADAMW_RATES = (2e-3, 4e-3, 8e-3)
RATES = (8e-3, 16e-3, 32e-3)
CHANGE, LATER = 100, 50  # steps
RESIDUALS = {"Fira's residual": "norm_scaled", "no residual": "none"}


class Watched:
    """A contender that notes the share of the energy of gradients in its subspaces as it runs."""

    def __init__(self, subspace: str, rank: float, residual: str, refresh: int) -> None:
        self.options: dict[str, Any] = {
            "subspace": subspace,
            "rank": rank,
            "residual": residual,
            "refresh_interval": refresh,
        }
        self.chosen: list[float] = []
        self.later: list[float] = []

    def make(self, model: nn.Module, lr: float) -> Optimizers:
        common = {
            "betas": BETAS,
            "eps": 1e-8,
            "transition": "move",
            "corrected_eps": False,
            "dictionary_interval": CHANGE,
        }
        self.optimizer = ProjectedAdam(param_groups(model), lr=lr, **common, **self.options)
        self.chosen, self.later = [], []
        return [self.optimizer]

    def watch(self, step: int, model: nn.Module) -> None:
        """Before a step."""
        if step % CHANGE == self.options["refresh_interval"] + 2:  # the step before has chosen
            self.chosen.append(statistics.mean(self.optimizer.captured_energy().values()))
        if step % LATER == LATER // 2:
            self.later.append(energy_inside(self.optimizer))


@torch.no_grad()
def energy_inside(optimizer: ProjectedAdam) -> float:
    """Share of the energy of the gradients at hand that lies in the subspaces, mean over matrices."""
    recipe, shares = optimizer.recipe(optimizer.param_groups[0]), []
    for matrix in optimizer._matrices():
        if matrix.role is not None:
            matrix.role.current = LearnedDictionary(optimizer.state[matrix.role.parameter][matrix.role.key])
        gradient = matrix.parameter.grad
        assert isinstance(gradient, Tensor)
        rows = matrix.layout.form.view(gradient)
        place = place_of(matrix, rows.device, optimizer._dictionaries, RandomBits(0, matrix.name, 0))
        basis = recipe.subspace.stored(matrix.state(optimizer.state[matrix.parameter]), place)
        shares.append(float(basis.project(rows).square().sum() / rows.square().sum()))
    return statistics.mean(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--text")
    parser.add_argument("--refresh", type=int, default=50)
    parser.add_argument("--only", nargs="+", help="contenders whose name contains one of these")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    text, steps = read_text(arguments.text), arguments.steps
    size = sum(p.numel() for p in make_model(0).parameters())
    print(f"{size} parameters, {steps} steps of {BATCH} x {LENGTH}, {arguments.seeds} seeds, torch {torch.__version__}")
    print(f"\n{'':36s}  {'loss':>7s}  {'range over seeds':>16s}  {'lr':>6s}  chosen  later  seconds")

    def compare(
        name: str, make: Callable[[nn.Module, float], Optimizers], rates: tuple[float, ...], watched: Any = None
    ) -> None:
        started, shares = time.perf_counter(), []
        options = {} if watched is None else {"watch": watched.watch}

        def once(lr: float, seed: int) -> float:
            loss = run(make, lr, seed, steps, text, **options)
            if watched is not None:
                shares.append((lr, statistics.mean(watched.chosen), statistics.mean(watched.later)))
            return loss

        if arguments.only and not any(part in name for part in arguments.only):
            return
        by_rate = {lr: once(lr, 0) for lr in rates}
        while (lr := min(by_rate, key=by_rate.__getitem__)) in (min(by_rate), max(by_rate)):
            beyond = lr / 2 if lr == min(by_rate) else lr * 2
            by_rate[beyond] = once(beyond, 0)
        losses = [by_rate[lr], *(once(lr, seed) for seed in range(1, arguments.seeds))]
        energies = [[each[index] for each in shares if each[0] == lr] for index in (1, 2)]
        columns = "  ".join(f"{statistics.mean(each):6.3f}" if each else "     -" for each in energies)
        print(
            f"{name:36s}  {statistics.mean(losses):7.4f}  {f'{min(losses):.4f}-{max(losses):.4f}':>16s}  {lr:6.3f}  "
            f"{columns}  {time.perf_counter() - started:7.0f}",
            flush=True,
        )

    compare("AdamW", adamw, ADAMW_RATES)
    for residual, option in RESIDUALS.items():
        for rank in (1 / 4, 1 / 8):
            for subspace in ("svd", "shared", "dct2", "random"):
                watched = Watched(subspace, rank, option, arguments.refresh)
                compare(f"{subspace}, n/{round(1 / rank)}, {residual}", watched.make, RATES, watched)


if __name__ == "__main__":
    main()
