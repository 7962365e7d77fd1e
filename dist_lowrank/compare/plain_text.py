"""A comparison as plain text for a terminal."""

from __future__ import annotations

import textwrap

from dist_lowrank.compare.comparison import Comparison
from dist_lowrank.compare.tables import aligned, one_line, tables, title

_WIDTH = 110  # of sentences; tables are as wide as they are


def plain_text(comparison: Comparison) -> str:
    """All tables, under the notes."""
    parts = [_underlined(one_line(title(comparison)), "=")]
    if comparison.notes:
        parts.append("".join(_wrapped(f"- {one_line(note)}", "  ") for note in comparison.notes))
    for table in tables(comparison):
        header, *rows = ("  ".join(cells).rstrip() + "\n" for cells in aligned(table, one_line))
        parts.append(_underlined(table.title, "-") + _wrapped(one_line(table.explanation)))
        parts.append(header + "".join(rows))
    return "\n".join(parts)


def _underlined(text: str, rule: str) -> str:
    return f"{text}\n{rule * len(text)}\n"


def _wrapped(text: str, indent: str = "") -> str:
    return "".join(f"{line}\n" for line in textwrap.wrap(text, _WIDTH, subsequent_indent=indent))
