"""A picture of memory by rank and cause, for more ranks than curves can be told apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_MOST_ROWS = 64  # more ranks share rows
_ROW, _COLUMN, _LABEL, _HEADER, _MARGIN = 20, 86, 110, 74, 8  # pixels
_LIGHT, _DARK = np.array([247, 251, 255]), np.array([8, 69, 148])  # of nothing, and of the most


def heat_map(bytes_by_cause: Mapping[str, Sequence[float]], title: str) -> NDArray[np.uint8]:
    """Draws a table: a row for each rank, a column for each cause, and in each cell the bytes.

    The darker a cell, the nearer it is to the most that any rank has of that cause. A row stands for several ranks
    where there are more than 64, and shows the most that one of them has. Causes of which no rank has anything are left
    out.

    Args:
        bytes_by_cause: bytes by rank.

    Returns:
        RGB, (height, width, 3).
    """
    held = {cause: figures for cause, figures in bytes_by_cause.items() if max(figures) > 0}
    ranks = max((len(figures) for figures in held.values()), default=0)
    together = max(1, math.ceil(ranks / _MOST_ROWS))
    rows = [range(first, min(first + together, ranks)) for first in range(0, ranks, together)]
    width = 2 * _MARGIN + max(_LABEL + _COLUMN * len(held), 8 * len(title))
    image = Image.new("RGB", (width, 2 * _MARGIN + _HEADER + _ROW * len(rows)), "white")
    draw = ImageDraw.Draw(image)
    font, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    draw.text((_MARGIN, _MARGIN), title, "black", bold)
    for line, row in enumerate(rows):
        label = f"rank {row[0]}" if together == 1 else f"ranks {row[0]}-{row[-1]}"
        draw.text((_MARGIN, _MARGIN + _HEADER + _ROW * line + _ROW // 2), label, "black", font, anchor="lm")
    for column, (cause, figures) in enumerate(held.items()):
        left, middle = _MARGIN + _LABEL + _COLUMN * column, _COLUMN // 2
        words = cause.replace("_", "\n", 1).replace("_", " ")
        draw.text((left + middle, _MARGIN + _HEADER - 6), words, "black", font, anchor="md", align="center")
        most = max(figures)
        for line, row in enumerate(rows):
            value = max(figures[rank] for rank in row)
            top = _MARGIN + _HEADER + _ROW * line
            color = tuple(np.rint(_LIGHT + (_DARK - _LIGHT) * max(0.0, value / most)).astype(int).tolist())
            draw.rectangle((left, top, left + _COLUMN - 2, top + _ROW - 2), color)
            ink = "white" if value > most / 2 else "black"
            draw.text((left + middle - 1, top + _ROW // 2 - 1), size(value), ink, font, anchor="mm")
    return np.asarray(image)


def size(number_of_bytes: float) -> str:
    """Three digits and a binary unit, such as `1.25 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number_of_bytes) < 999.5:
            return f"{number_of_bytes:.3g} {unit}"
        number_of_bytes /= 1024
    return f"{number_of_bytes:.3g} TiB"
