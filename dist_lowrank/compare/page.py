"""A comparison as one HTML page that needs nothing else: no script, no network."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping

from dist_lowrank.compare.comparison import Comparison
from dist_lowrank.compare.tables import Table, numeric_columns, tables, title

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 2rem auto; max-width: 85rem;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p, ul { max-width: 50rem; color: #444; margin: .3rem 0 .6rem; }
.notes { background: #fff6e0; border-left: 4px solid #e69f00; padding: .5rem 1rem .5rem 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; font-weight: 600; } td:first-child { white-space: nowrap; }
.number { text-align: right; } td.number { white-space: nowrap; } th { vertical-align: bottom; }
tbody tr:hover { background: #f4f6fa; } .fails { color: #b00020; font-weight: 700; }
figure { margin: .5rem 0; } svg { max-width: 100%; height: auto; }
"""


def page(comparison: Comparison, pictures: Mapping[str, str]) -> str:
    """The page, with the given SVG pictures by their titles."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        '<meta name="viewport" content="width=device-width">\n',
        f"<title>{_text(title(comparison))}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n",
        f"<h1>{_text(title(comparison))}</h1>\n<p>{_text(introduction(comparison))}</p>\n",
    ]
    if comparison.notes:
        parts.append(f'<ul class="notes">{"".join(f"<li>{_text(note)}</li>" for note in comparison.notes)}</ul>\n')
    all_tables = tables(comparison)
    first = 1 + bool(comparison.outcomes)  # the summary, and the assertions
    for table in all_tables[:first]:
        parts += _html_table(table)
    for caption, picture in pictures.items():
        drawing = picture[picture.index("<svg") :]
        parts.append(f"<h2>{_text(caption)}</h2>\n<figure>\n{drawing}</figure>\n")
    for table in all_tables[first:]:
        parts += _html_table(table)
    parts.append("</body>\n</html>\n")
    return "".join(parts)


def introduction(comparison: Comparison) -> str:
    """What was compared, for someone who has run nothing of it."""
    baseline = comparison.groups[0]
    config = baseline.first.config
    data, train = config["data"], config["train"]
    source = data.get("dataset") or data.get("path") or data["source"]
    seeds = f"seed{'s' if len(baseline.seeds) > 1 else ''} {', '.join(map(str, baseline.seeds))}"
    model = config["model"]["name"] if not config["model"]["pretrained"] else config["model"]["pretrained"]
    return (
        f"Model {model}, trained on {source} in sequences of {data['sequence_length']} tokens, "
        f"{train['global_batch_size']} sequences per step, {seeds}, on {baseline.world_size} ranks "
        f"({config['strategy']['name']}, {config['precision']['name']}). "
        f"{baseline.label} is what the others are measured against."
    )


def _html_table(table: Table) -> Iterator[str]:
    numeric = numeric_columns(table)
    yield f"<h2>{_text(table.title)}</h2>\n"
    if table.explanation:
        yield f"<p>{_text(table.explanation)}</p>\n"
    yield '<div class="wide"><table>\n<thead><tr>'
    for heading, right in zip(table.headings, numeric, strict=True):
        yield f"<th{' class=number' if right else ''}>{_text(heading)}</th>"
    yield "</tr></thead>\n<tbody>\n"
    for row in table.rows:
        cells = []
        for cell, right in zip(row, numeric, strict=True):
            kind = " class=number" if right else " class=fails" if cell == "DOES NOT HOLD" else ""
            cells.append(f"<td{kind}>{_text(cell)}</td>")
        yield f"<tr>{''.join(cells)}</tr>\n"
    yield "</tbody></table></div>\n"


def _text(text: str) -> str:
    return html.escape(text)
