"""What a check found, and how that is told."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

Status = Literal["ok", "warning", "failed"]
_WIDTH = 90  # of the columns after the names


@dataclass(frozen=True, slots=True)
class Item:
    """One check of one node, or of all of them together."""

    name: str  # stable: scripts depend on it
    status: Status
    found: str
    remedy: str = ""  # of a warning or a failure: what to do
    node: str = ""  # as the user wrote it; empty: of a single node, or of all together


def is_fit(items: Sequence[Item]) -> bool:
    """Whether a training can run: warnings do not count."""
    return all(item.status != "failed" for item in items)


def as_json(items: Sequence[Item]) -> str:
    """For scripts: `{"fit": true, "items": [...]}` on one line."""
    return json.dumps({"fit": is_fit(items), "items": [asdict(item) for item in items]})


def as_text(items: Sequence[Item]) -> str:
    """For people: a line for each item, its remedy below where there is one; what nodes have in common stands once."""
    nodes_of: dict[Item, list[str]] = {}
    for item in items:
        nodes_of.setdefault(replace(item, node=""), []).append(item.node)
    count = len({item.node for item in items} - {""})
    rows = [(item, _names(nodes, count), item.name) for item, nodes in nodes_of.items()]
    widths = [max(map(len, column)) for column in ([nodes for _, nodes, _ in rows], [name for *_, name in rows])]
    lines = []
    for item, nodes, name in rows:
        first = f"{item.status:7}  " + (f"{nodes:{widths[0]}}  " if count else "") + f"{name:{widths[1]}}  "
        shown = [item.found, *([f"remedy: {item.remedy}"] if item.remedy else [])]
        wrapped = [line for text in shown for line in textwrap.wrap(text, _WIDTH) or [""]]
        lines += [f"{first if number == 0 else ' ' * len(first)}{line}" for number, line in enumerate(wrapped)]
    failed, warned = (sum(item.status == status for item in items) for status in ("failed", "warning"))
    lines.append(f"\n{len(items)} checks, {failed} failed, {warned} warnings")
    return "\n".join(lines)


def _names(nodes: Sequence[str], count: int) -> str:
    if nodes == [""]:
        return "together"
    if len(nodes) == count > 1:
        return f"all {count}"
    return ", ".join(nodes) if len(nodes) < 4 else f"{', '.join(nodes[:2])} and {len(nodes) - 2} more"
