"""How near plans come to the peak of real runs on the GPUs of this machine.

    python benchmarks/planned_peak.py [--models llama_60m llama_350m] [--optimizers adamw dct_adamw]

Each run makes a few steps, its memory tracked at the third; then its plan is compared with what torch's allocator held
at most. Ends with code 1 if a planned peak is more than 5 % off.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from dist_lowrank.planning.reconcile import TOTAL, print_reconciled, reconcile

ALLOWED = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama_60m", "llama_350m"])
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "dct_adamw"])
    parser.add_argument("overrides", nargs="*", help="of the runs")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is visible", file=sys.stderr)
        return 1
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            for optimizer in options.optimizers:
                errors = _errors(folder, model, optimizer, options.overrides)
                worst = max(worst, *map(abs, errors))
                print(f"{model} {optimizer}: planned peak {', '.join(f'{each:+.2%}' for each in errors)} by rank\n")
    print(f"worst {worst:.2%}, allowed {ALLOWED:.0%}")
    return int(worst > ALLOWED)


def _errors(folder: str, model: str, optimizer: str, more: list[str]) -> list[float]:
    """Of the planned peak, by rank, relative to the measured one."""
    runs = Path(folder) / f"{model}-{optimizer}"
    overrides = [f"model={model}", f"optimizer={optimizer}", "precision=bf16", "train.steps=3", f"runs={runs}"]
    quiet = ["train.export=false", "checkpoint.at_end=false", "telemetry.memory_tracker_steps=[3]", *more]
    subprocess.run([sys.executable, "-m", "dist_lowrank.cli", "train", *overrides, *quiet], check=True)
    found = reconcile(str(next(runs.iterdir())))
    print_reconciled(found)
    return [
        planned / measured - 1
        for planned, measured in zip(found.planned[TOTAL], found.measured[TOTAL], strict=True)
        if measured
    ]


if __name__ == "__main__":
    sys.exit(main())
