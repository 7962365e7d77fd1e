"""What the benchmarks of docs/speed.md share: clocks, the machine they ran on, and where their tables go."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "speed.md"
# Threads that wait for each other, or for the network, count nothing on the second.
CLOCKS = {"elapsed": time.perf_counter, "processor": time.process_time}


def with_table(text: str, name: str, table: str) -> str:
    """A document with another table between the comments of its name.

    Raises:
        ValueError: it has no such comments.
    """
    begin, end = f"<!-- {name}: written by --write -->", "<!-- end -->"
    before, found, rest = text.partition(begin)
    if not found:
        raise ValueError(f"{DOCUMENT.name} has no place for this table; allowed: one with a line {begin!r}")
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"


def show(name: str, table: str, *, write: bool) -> str:
    """Prints a table and, where asked, puts it into docs/speed.md."""
    if write:
        DOCUMENT.write_text(with_table(DOCUMENT.read_text(), name, table))
    print(f"\n{table}")
    return table


def provenance(script: str, arguments: Sequence[str] | None, device: torch.device) -> str:
    """The command, the commit and the machine behind a table, in a line of Markdown.

    Args:
        script: `__file__` of the benchmark.
        arguments: those it was called with; None: of the command line.
    """
    words = sys.argv[1:] if arguments is None else arguments
    shown = [word for word in words if word != "--write"]
    command = shlex.join(["python", f"benchmarks/{Path(script).name}", *shown])
    return f"`{command}` at commit {_commit()}, on {_machine(device)}."


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, text=True, capture_output=True).stdout.strip() or "unknown"


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "CPU")
    return f"{model}, {os.cpu_count()} cores, load of the machine {os.getloadavg()[0]:.1f}"
