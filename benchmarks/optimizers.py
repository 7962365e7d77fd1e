"""Trains the default model with every optimizer, and writes a table of loss, state and time into docs/optimizers.md.

    python benchmarks/optimizers.py [--steps 100] [--only NAME ...] [--runs FOLDER]

Each line is a run of `dist-lowrank train` in two real processes, one after the other, on the same data in the same
order; what it shows is read back from the run's folder. Learning rates were chosen by short runs of a smaller model
(hidden size 64, two layers), two or three for each optimizer, so a factor of two may be left in any of them. The runs
are so short that the order of the losses says little: they show that everything trains, and what it costs.

The exit code is 1 if an optimizer has not brought the loss down by at least three quarters of what AdamW has.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_lowrank.telemetry import tags

DOCUMENT = Path(__file__).parents[1] / "docs" / "optimizers.md"
BEGIN = "<!-- optimizer table: written by `make optimizer-table`; do not edit -->"
END = "<!-- end of the optimizer table -->"
SETTINGS = (
    *("train.eval_interval=1000000", "train.eval_sequences=128", "train.export=false", "train.sample_tokens=0"),
    *("checkpoint.interval_minutes=null", "checkpoint.at_end=false", "telemetry.tensorboard=false"),
    *("launcher.device=cpu", "launcher.nproc_per_node=2"),
)
REFRESH = "optimizer.refresh_interval=25"  # four in a hundred steps
DENSE = "optimizer.dense_lr=0.01"  # of embeddings, head and norms
# By line of the table: the overrides of its run.
CONTENDERS: dict[str, tuple[str, ...]] = {
    "adamw": ("optimizer=adamw", "optimizer.lr=0.003"),
    "adamw8bit": ("optimizer=adamw8bit", "optimizer.lr=0.003"),
    "dct_adamw": ("optimizer=dct_adamw", "optimizer.lr=0.006"),
    "dct_adamw, shared dictionary": (
        *("optimizer=dct_adamw", "optimizer.lr=0.006"),
        *("optimizer.dictionary=shared", "optimizer.dictionary_interval=50"),
    ),
    "galore": ("optimizer=galore", "optimizer.lr=0.02", REFRESH),
    "galore2": ("optimizer=galore2", "optimizer.lr=0.02", REFRESH),
    "golore": ("optimizer=golore", "optimizer.lr=0.02", REFRESH),
    "grass": ("optimizer=grass", "optimizer.lr=0.02", REFRESH),
    "fira": ("optimizer=fira", "optimizer.lr=0.02", REFRESH),
    "fira, dct2": ("optimizer=fira", "optimizer/subspace=dct2", "optimizer.lr=0.02", REFRESH),
    "subtrack": ("optimizer=subtrack", "optimizer.lr=0.02", REFRESH),
    "frugal": ("optimizer=frugal", "optimizer.lr=0.003", REFRESH),
    "apollo": ("optimizer=apollo", "optimizer.lr=0.02", REFRESH),
    "apollo_mini": ("optimizer=apollo_mini", "optimizer.lr=0.01", REFRESH),
    "ldadam": ("optimizer=ldadam", "optimizer.lr=0.01"),
    "trion": ("optimizer=trion", "optimizer.lr=0.02", DENSE),
    "muon": ("optimizer=muon", "optimizer.lr=0.01", DENSE),
    "dion": ("optimizer=dion", "optimizer.lr=0.01", DENSE),
    "dion3": ("optimizer=dion3", "optimizer.lr=0.01", DENSE),
    "scale": ("optimizer=scale", "optimizer.lr=0.003", DENSE),
    "adafactor": ("optimizer=adafactor", "optimizer.lr=0.003"),
    "came": ("optimizer=came", "optimizer.lr=0.001"),
    "smmf": ("optimizer=smmf", "optimizer.lr=0.003"),
}
NOT_STATE = ("parameters", "gradients", "allocator_peak")
SHARE_OF_ADAMW = 0.75  # of what it brings the loss down by


@dataclass(frozen=True)
class Result:
    """What one run came to."""

    name: str
    overrides: Sequence[str]
    first_loss: float  # nats per held-out token, before training
    loss: float  # after it
    state_bytes: int  # of the fullest rank, dictionaries included
    optimizer_milliseconds: float  # median of the steps of rank 0
    step_milliseconds: float  # the same, of the whole step


def train(name: str, steps: int, runs: Path) -> Result:
    """One run in processes of its own.

    Raises:
        subprocess.CalledProcessError: it failed; its output was shown.
    """
    overrides = CONTENDERS[name]
    folder = runs / name.replace(", ", "-").replace(" ", "_")
    verb = [str(Path(sys.executable).with_name("dist-lowrank")), "train"]
    command = [*verb, *overrides, *SETTINGS, f"train.steps={steps}", f"runs={folder}"]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        done.check_returncode()
    return read(name, overrides, max(folder.glob("*/FINISHED"), key=lambda path: path.stat().st_mtime).parent)


def read(name: str, overrides: Sequence[str], folder: Path) -> Result:
    """The figures of a finished run."""
    summary = json.loads((folder / "FINISHED").read_text())
    ranks = sorted((folder / f"attempt-{summary['attempt']}" / "metrics").glob("rank_*.jsonl"))
    entries = [[json.loads(line) for line in path.read_text().splitlines()] for path in ranks]
    steps = [[entry for entry in rank if tags.OPTIMIZER_MILLISECONDS in entry] for rank in entries]
    optimizer = [entry[tags.OPTIMIZER_MILLISECONDS] for entry in steps[0]]
    share = [entry[tags.OPTIMIZER_SHARE] for entry in steps[0]]
    return Result(
        name,
        overrides,
        summary["first_validation_loss"],
        summary["validation_loss"],
        max(_state_bytes(rank[-1]) for rank in steps),
        statistics.median(optimizer),
        statistics.median(each / part for each, part in zip(optimizer, share, strict=True) if part > 0),
    )


def _state_bytes(entry: Mapping[str, float]) -> int:
    prefix = tags.memory_bytes("")
    left_out = {tags.memory_bytes(cause) for cause in NOT_STATE}
    return sum(int(value) for key, value in entry.items() if key.startswith(prefix) and key not in left_out)


def behind(results: Sequence[Result]) -> list[str]:
    """The names of those that have not come near AdamW, if it is among them."""
    drops = {result.name: result.first_loss - result.loss for result in results}
    return [name for name, drop in drops.items() if not drop >= SHARE_OF_ADAMW * drops.get("adamw", 0.0)]


def render(results: Sequence[Result], steps: int) -> str:
    """The table in Markdown, best loss first."""
    lines = [
        f"The default model, {steps} steps of 2048 tokens on two processes of {_machine()}, at commit {_commit()}; "
        f"before training the loss is {results[0].first_loss:.2f}.",
        "",
        "| optimizer | loss | state per rank, KB | optimizer, ms | step, ms | overrides |",
        "|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda each: each.loss):
        lines.append(
            f"| {result.name} | {result.loss:.3f} | {result.state_bytes / 1e3:,.0f} | "
            f"{result.optimizer_milliseconds:.0f} | {result.step_milliseconds:.0f} | `{shlex.join(result.overrides)}` |"
        )
    return "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """A document with another table between its two comments."""
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def _machine() -> str:
    models = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line
    ]
    return (
        f"a machine with {os.cpu_count()} cores ({models[0]})" if models else f"a machine with {os.cpu_count()} cores"
    )


def _commit() -> str:
    command = ["git", "-C", str(DOCUMENT.parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, text=True, capture_output=True).stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "optimizer-table")
    options = parser.parse_args()
    results = []
    for name in options.only:
        start = time.monotonic()
        results.append(train(name, options.steps, options.runs))
        print(f"{name}: loss {results[-1].loss:.4f}, {time.monotonic() - start:.0f} s", flush=True)
    table = render(results, options.steps)
    print(f"\n{table}")
    if options.only == list(CONTENDERS):
        DOCUMENT.write_text(with_table(DOCUMENT.read_text(), table))
    late = behind(results)
    if late:
        print(f"\nbehind AdamW: {', '.join(late)}", file=sys.stderr)
    return int(bool(late))


if __name__ == "__main__":
    sys.exit(main())
