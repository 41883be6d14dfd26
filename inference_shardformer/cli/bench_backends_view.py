"""The table of `bench backends`: the fastest of each bucket stands out, the disqualified with their reason."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, TextIO

from inference_shardformer.cli.tables import empty_table, print_table

if TYPE_CHECKING:
    from inference_shardformer.tuning.comparison import Comparison
    from inference_shardformer.tuning.measurement import Measurement

_COLUMNS = ("phase", "batch", "length", "backend", "layer time", "tokens/s", "max error", "verdict")
_RIGHT = ("batch", "length", "layer time", "tokens/s", "max error")
_WIDTH_OF_FILES = 120


def show(comparison: Comparison, stream: TextIO) -> None:
    """Print the comparison, as wide as the terminal, or as a fixed width in a file."""
    from rich.console import Console
    from rich.text import Text

    width = shutil.get_terminal_size().columns if stream.isatty() else _WIDTH_OF_FILES
    console = Console(file=stream, width=width, highlight=False)
    ranks = "1 rank" if comparison.num_ranks == 1 else f"the slowest of {comparison.num_ranks} ranks"
    rounds = "1 round" if comparison.rounds == 1 else f"{comparison.rounds} rounds"
    console.print(f"{comparison.of}\n{comparison.device}, {ranks}, {rounds}", markup=False)
    fastest = comparison.fastest()
    every = [_cells(row, is_fastest=place in fastest) for place, row in enumerate(comparison.rows)]
    table = empty_table(_COLUMNS, every, wrapped="verdict", right=_RIGHT)
    for place, (row, cells) in enumerate(zip(comparison.rows, every, strict=True)):
        style = "bold" if place in fastest else "" if row.is_valid else "red"
        is_last = place + 1 == len(comparison.rows) or comparison.rows[place + 1].bucket != row.bucket
        table.add_row(*(Text(cell, style=style) for cell in cells), end_section=is_last)
    print_table(table, stream, width=width)
    for name, reason in comparison.refused.items():
        console.print(f"{name} cannot serve: {reason}", markup=False)
    found = f"{comparison.choice}: {comparison.why}" if comparison.choice else "none is right in every bucket"
    console.print(f"choice: {found}", markup=False)


def _cells(row: Measurement, *, is_fastest: bool) -> tuple[str, ...]:
    rate = row.tokens_per_second
    verdict = f"disqualified: {row.problem or 'not timed'}" if not row.is_valid else "fastest" if is_fastest else "ok"
    return (
        row.phase,
        str(row.batch),
        str(row.length),
        row.backend,
        "-" if row.seconds is None else _time(row.seconds),
        "-" if rate is None else f"{rate:,.0f}",
        "-" if row.max_error is None else f"{row.max_error:.2g}",
        verdict,
    )


def _time(seconds: float) -> str:
    """Three digits with a unit."""
    return (
        f"{seconds * 1e6:.1f} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:.2f} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )
