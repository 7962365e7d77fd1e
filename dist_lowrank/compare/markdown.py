"""A comparison as Markdown, whose columns line up also where it is read as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from dist_lowrank.compare.comparison import Comparison
from dist_lowrank.compare.tables import Table, numeric_columns, tables, title


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
    cells = [[_escaped(cell) for cell in row] for row in (table.headings, *table.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.headings))]
    numeric = numeric_columns(table)

    def line(row: Sequence[str]) -> str:
        aligned = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True))
        return f"| {' | '.join(aligned)} |\n"

    rules = (f"{'-' * (width + 1)}{':' if right else '-'}" for width, right in zip(widths, numeric, strict=True))
    return line(cells[0]) + f"|{'|'.join(rules)}|\n" + "".join(map(line, cells[1:]))


def _escaped(text: str) -> str:
    """As one line of a Markdown table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<")
