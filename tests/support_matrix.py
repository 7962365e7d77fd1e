"""The support matrix of the README: which optimizer runs how under which strategy, as the tests say.

A test says what it shows:

    @supports("exact")                                  # strategy and optimizer are read from its parameters
    @supports("refused", strategy="FSDP1", reason="...")    # of all optimizers, if it has no such parameter
    @supports("differs", strategy="FSDP2", variant='side="unsharded"', reason="...")     # a note, not the cell

`make support-matrix` runs the marked tests and writes the table; a cell holds its verdict only if all of its tests
passed. `test_support_matrix.py` compares the table with the marks, without running them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

OPTIMIZERS = (
    *("DCTAdamW", "Trion", "GaLore", "GoLore", "Fira", "Frugal", "Apollo", "LDAdam", "SubTrack", "Grass"),
    *("Muon", "Dion", "Dion3"),
    *("SCALE", "Adafactor", "CAME", "SMMF", "AdamW8bit"),
)
STRATEGIES = (
    *("one process", "DDP", "FSDP2", "HSDP", "flat slices", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"),
    *("FSDP1", "layer-wise hooks", "strided shards", "two sharded mesh dimensions"),
)
VERDICTS = ("exact", "differs", "refused")
BEGIN = "<!-- support matrix: written by `make support-matrix` from the tests; do not edit -->"
END = "<!-- end of the support matrix -->"

# What tests call them in their parameters. An optimizer is known by the beginning of its name.
_STRATEGY_NAMES = {
    **{strategy: strategy for strategy in STRATEGIES},
    "ddp": "DDP",
    "fsdp": "FSDP2",
    "fsdp_rows": "FSDP2",
    "fsdp_last": "FSDP2",
    "hsdp": "HSDP",
    "flat": "flat slices",
    **{f"zero{stage}": f"ZeRO-{stage}" for stage in range(4)},
}
_OPTIMIZER_BEGINNINGS = {"dct_adamw": "DCTAdamW"} | {name.lower(): name for name in OPTIMIZERS[1:]}


def supports(
    verdict: str, *, strategy: str | None = None, optimizer: str | None = None, variant: str = "", reason: str = ""
) -> pytest.MarkDecorator:
    """Marks a test as showing a verdict.

    Args:
        strategy: of STRATEGIES; by default the test's parameter `strategy` (ddp with `world_size` 1: one process).
        optimizer: of OPTIMIZERS; by default the test's parameter `optimizer`, `kind` or `make`, without one all.
        variant: options under which the verdict holds; it is then a note under the table and not in the cell.
        reason: why it is not exact, and the way out.

    Raises:
        ValueError: for a name that the table does not have, or a verdict other than exact without a reason.
    """
    if verdict not in VERDICTS or (strategy or "DDP") not in STRATEGIES or (optimizer or "Trion") not in OPTIMIZERS:
        raise ValueError(f"supports({verdict!r}, strategy={strategy!r}, optimizer={optimizer!r}) is not in the table")
    if verdict != "exact" and not reason:
        raise ValueError(f"supports({verdict!r}): a reason is missing")
    return pytest.mark.supports(verdict=verdict, strategy=strategy, optimizer=optimizer, variant=variant, reason=reason)


@dataclass(frozen=True)
class Claim:
    """What one test shows of one optimizer under one strategy."""

    optimizer: str
    strategy: str
    verdict: str
    variant: str = ""
    reason: str = ""


def claims_of(item: pytest.Item) -> list[Claim]:
    """The claims of a collected test, one per mark and optimizer."""
    parameters: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    claims = []
    for mark in item.iter_markers("supports"):
        said = dict(mark.kwargs)
        strategy, optimizer = said.pop("strategy"), said.pop("optimizer")
        strategy = strategy or _STRATEGY_NAMES[parameters["strategy"]]
        if strategy == "DDP" and parameters.get("world_size") == 1:
            strategy = "one process"
        named = next((parameters[key] for key in ("optimizer", "kind", "make") if key in parameters), None)
        if optimizer is None and isinstance(named, type):
            optimizer = named.__name__
        elif optimizer is None and named is not None:
            longest = max((start for start in _OPTIMIZER_BEGINNINGS if named.startswith(start)), key=len)
            optimizer = _OPTIMIZER_BEGINNINGS[longest]
        claims += [Claim(each, strategy, **said) for each in ([optimizer] if optimizer else OPTIMIZERS)]
    return claims


def render(claims: Iterable[Claim], failed: Iterable[Claim] = ()) -> str:
    """The table in Markdown, and the notes under it.

    Args:
        claims: of all marked tests.
        failed: of those that did not pass; their cells say so.

    Raises:
        ValueError: two tests that contradict each other about a cell.
    """
    claims = sorted(set(claims), key=_position)
    broken = {(claim.optimizer, claim.strategy) for claim in failed}
    lines = [
        "| | " + " | ".join(STRATEGIES) + " |",
        "|---" * (len(STRATEGIES) + 1) + "|",
    ]
    for optimizer in OPTIMIZERS:
        cells = []
        for strategy in STRATEGIES:
            here = [c for c in claims if (c.optimizer, c.strategy, c.variant) == (optimizer, strategy, "")]
            verdicts = {claim.verdict for claim in here}
            if len(verdicts) > 1:
                raise ValueError(f"tests contradict each other about {optimizer} under {strategy}: {sorted(verdicts)}")
            cells.append("failing" if (optimizer, strategy) in broken else verdicts.pop() if verdicts else "-")
        lines.append(f"| {optimizer} | " + " | ".join(cells) + " |")
    notes: dict[str, list[str]] = {}
    for claim in claims:
        if claim.reason or claim.variant:
            under = f"{claim.strategy} with {claim.variant}" if claim.variant else claim.strategy
            text = f"{under}: {claim.verdict}" + (f", because {claim.reason}" if claim.reason else "")
            notes.setdefault(text, []).append(claim.optimizer)
    for text, optimizers in notes.items():
        few = "" if set(optimizers) == set(OPTIMIZERS) else f"{', '.join(optimizers)} under "
        lines += ["", f"- {few}{text}."] if lines[-1].startswith("|") else [f"- {few}{text}."]
    return "\n".join(lines)


def _position(claim: Claim) -> tuple[Any, ...]:
    return STRATEGIES.index(claim.strategy), claim.variant, claim.reason, OPTIMIZERS.index(claim.optimizer)


def table_in(text: str) -> str:
    """What stands between the two comments of the README."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def with_table(text: str, table: str) -> str:
    """The README with another table between its two comments."""
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"
