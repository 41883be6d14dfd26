"""`explain`: what would be decided for a model, and why, without ranks and without reading a weight."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inference_shardformer.cli.models import resolve_model
from inference_shardformer.cli.parser import GENERATE_FLAGS, add_config_flags, add_model_options, sources_of
from inference_shardformer.cli.ranks import is_main_rank
from inference_shardformer.cli.tables import empty_table, print_table
from inference_shardformer.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.table import Table

    from inference_shardformer.cli.parser import Commands
    from inference_shardformer.explaining.explanation import Explanation

_WIDTH_OF_FILES = 120


def add_command(commands: Commands) -> None:
    """Add `explain` to the parser."""
    parser = commands.add_parser(
        "explain",
        help="show every setting, where it comes from and why",
        description="Every setting with its value, its origin, its reason and what it overrides; with --model also the "
        "shard of each rank and a verdict on every attention backend. Reads no weights and starts no ranks.",
    )
    add_model_options(parser, is_required=False)
    add_config_flags(parser, GENERATE_FLAGS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Explain, as a table on a terminal, as aligned text in a file, as one object for programs."""
    from inference_shardformer import explain

    model = None if args.model is None else resolve_model(args.model)
    explanation = explain(model, sources=sources_of(args))
    terminal = Terminal(is_main=is_main_rank())
    if args.json:
        terminal.record(explanation.to_json())
    elif not sys.stdout.isatty():
        terminal.text(explanation.as_text(_WIDTH_OF_FILES) + "\n")
    elif terminal.is_main:
        _show(explanation)
    return 0


def _show(explanation: Explanation) -> None:
    """Tables as wide as the terminal."""
    from rich.console import Console

    from inference_shardformer.explaining.text import COLUMNS, REQUESTS

    console = Console(width=shutil.get_terminal_size().columns, highlight=False)
    for line in explanation.headline():
        console.print(line, markup=False)
    console.print()
    print_table(_table(COLUMNS, explanation.rows()), sys.stdout, width=console.width)
    console.print(f"\n{REQUESTS}", markup=False)
    for found in (explanation.verdicts(), explanation.kernel_verdicts()):
        if found:
            console.print()
            print_table(_table(found[0], found[1:]), sys.stdout, width=console.width)
    for event in explanation.events:
        console.print(f"let pass: {event.message}", markup=False)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table in which headings stand out, and what somebody asked for does from the defaults."""
    from rich.text import Text

    table = empty_table(header, rows, wrapped=header[-1])
    for row in rows:
        style = "bold" if not any(row[1:]) else "dim" if row[-1].startswith("default") else ""
        table.add_row(*(Text(cell, style=style) for cell in row))
    return table
