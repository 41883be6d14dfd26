"""Tables on a terminal: as wide as it is, and wider where words or numbers would be cut in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.table import Table

_UNBOUNDED = 10_000
_LONGEST_WORD = 28


def empty_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, wrapped: str = "", right: Sequence[str] = ()
) -> Table:
    """A table with the columns that `rows` need, and without rows yet. Only the column `wrapped` breaks its cells."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for place, name in enumerate(header):
        cells = [name, *(row[place] for row in rows if any(row[1:]) or not place)]
        is_wrapped = name == wrapped
        words = [word for cell in cells for word in cell.split()] if is_wrapped else cells
        longest = max(map(len, words))
        table.add_column(
            name,
            overflow="fold",
            no_wrap=not is_wrapped,
            min_width=min(longest, _LONGEST_WORD) if is_wrapped else longest,
            justify="right" if name in right else "left",
        )
    return table


def print_table(table: Table, stream: TextIO, *, width: int) -> None:
    """Draw the table in `width` columns, or in as many as it needs: the terminal breaks its lines then."""
    from rich.console import Console
    from rich.measure import Measurement

    wide = Console(file=stream, width=_UNBOUNDED)
    needed = Measurement.get(wide, wide.options, table).minimum
    Console(file=stream, width=max(width, needed), highlight=False).print(table)
