"""A comparison as Markdown, whose columns line up also where it is read as plain text."""

from __future__ import annotations

from dist_lowrank.compare.comparison import Comparison
from dist_lowrank.compare.tables import Table, aligned, numeric_columns, one_line, tables, title


def markdown(comparison: Comparison) -> str:
    """All tables, under the notes."""
    parts = [f"# {_escaped(title(comparison))}\n"]
    if comparison.notes:
        parts.append("".join(f"- {_escaped(note)}\n" for note in comparison.notes))
    for table in tables(comparison):
        parts.append(f"## {table.title}\n")
        if table.explanation:
            parts.append(f"{table.explanation}\n")
        parts.append(_markdown_table(table))
    return "\n".join(parts)


def _markdown_table(table: Table) -> str:
    rows = aligned(table, _escaped)
    header, *lines = (f"| {' | '.join(cells)} |\n" for cells in rows)
    columns = zip(rows[0], numeric_columns(table), strict=True)
    rules = ("-" * (len(cell) + 1) + (":" if right else "-") for cell, right in columns)
    return header + f"|{'|'.join(rules)}|\n" + "".join(lines)


def _escaped(text: str) -> str:
    """As one line of a Markdown table."""
    return one_line(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<")
