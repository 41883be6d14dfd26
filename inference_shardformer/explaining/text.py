"""Rows of text aligned within a width: long cells are wrapped."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

COLUMNS = ("setting", "value", "from, and why")
REQUESTS = "inference.sampling are defaults: what a request brings for itself beats them"
INDENT = "  "
_GAP = "  "
_NARROWEST = 12


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The rows below their header, one or more lines each; a row with nothing but its first cell is a heading."""
    table = [header, *rows]
    cells = [row for row in table if any(row[1:])]
    widths = _fitted([max(len(row[place]) for row in cells) for place in range(len(header))], width)
    return [line for row in table for line in (_wrapped(row, widths) if any(row[1:]) else [row[0]])]


def _fitted(natural: list[int], width: int) -> list[int]:
    """Widths that fit together: the widest columns but the first give way, as far as they can."""
    widths = list(natural)
    room = width - len(_GAP) * (len(widths) - 1)
    while sum(widths) > room:
        place = max(range(1, len(widths)), key=lambda column: widths[column], default=0)
        if place == 0 or widths[place] <= _NARROWEST:
            break
        widths[place] -= 1
    return widths


def _wrapped(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The lines of one row."""
    cells = [_lines(cell, width) for cell, width in zip(row, widths, strict=True)]
    height = max(len(cell) for cell in cells)
    return [
        _GAP.join(
            (cell[line] if line < len(cell) else "").ljust(width) for cell, width in zip(cells, widths, strict=True)
        ).rstrip()
        for line in range(height)
    ]


def _lines(cell: str, width: int) -> list[str]:
    """One cell as lines; its indentation is kept on the first."""
    return textwrap.wrap(cell, width, break_on_hyphens=False, drop_whitespace=True) or [""]
