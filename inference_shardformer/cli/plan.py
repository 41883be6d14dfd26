"""`plan`: what a model needs on so many ranks, from its configuration and headers; as text, as JSON, as a plan file."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inference_shardformer.cli.models import resolve_model
from inference_shardformer.cli.parser import GENERATE_FLAGS, add_config_flags, add_model_options, sources_of
from inference_shardformer.cli.policies import load_policy
from inference_shardformer.cli.ranks import is_main_rank
from inference_shardformer.cli.report import UsageError
from inference_shardformer.cli.tables import empty_table, print_table
from inference_shardformer.cli.terminal import Terminal
from inference_shardformer.config.units import converted

if TYPE_CHECKING:
    from rich.table import Table

    from inference_shardformer.cli.parser import Commands
    from inference_shardformer.planning.report import PlanReport

_WIDTH_OF_FILES = 120


def add_command(commands: Commands) -> None:
    """Add `plan` to the parser."""
    parser = commands.add_parser(
        "plan",
        help="show how a model is cut over ranks and what it needs",
        description="How each parameter is cut over the ranks, the bytes of weights and cache on each, what fits into "
        "its memory, what the ranks exchange, and which numbers of ranks are possible. Reads config.json and the "
        "headers of the weights; needs no network for a local folder, and starts no ranks.",
    )
    add_model_options(parser)
    add_config_flags(parser, GENERATE_FLAGS)
    parser.add_argument(
        "--memory", metavar="SIZE", help="memory of each rank, such as 16GiB; by default its share of what is free here"
    )
    parser.add_argument("--policy", metavar="MODULE:CLASS", help="a policy of your own; FILE.py:CLASS works as well")
    parser.add_argument("--all", action="store_true", help="a row for every parameter, not one for equal layers")
    parser.add_argument("--out", metavar="FILE.json", help="write the plan as a file that `generate --plan` loads from")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Plan, show the report on standard output, and write the file if one was asked for."""
    from inference_shardformer import plan_model

    memory = None if args.memory is None else _bytes(args.memory)
    policy = None if args.policy is None else load_policy(args.policy)
    report = plan_model(resolve_model(args.model), sources=sources_of(args), policy=policy, memory=memory)
    terminal = Terminal(is_main=is_main_rank())
    if args.json:
        terminal.record(report.to_json())
    elif not sys.stdout.isatty():
        terminal.text(report.as_text(_WIDTH_OF_FILES, is_complete=args.all) + "\n")
    elif terminal.is_main:
        _show(report, is_complete=args.all)
    if args.out and terminal.is_main:
        report.file.write(args.out)
        terminal.note(f"saved      {args.out}: load it with from_pretrained(plan=...) or generate --plan {args.out}")
    return 0


def _bytes(text: str) -> int:
    """A size such as `16GiB` in bytes."""
    size = int(text) if text.isdecimal() else converted(text, "bytes")
    if not size or size < 0:
        raise UsageError(f"--memory {text}: is not a size", remedy="write a number with a unit, such as 16GiB or 800MB")
    return int(size)


def _show(report: PlanReport, *, is_complete: bool) -> None:
    """Tables as wide as the terminal."""
    from rich.console import Console

    from inference_shardformer.planning.text import headline, tables

    console = Console(width=shutil.get_terminal_size().columns, highlight=False)
    for line in headline(report, console.width):
        console.print(line, markup=False)
    for header, rows in tables(report, is_complete=is_complete):
        console.print()
        print_table(_table(header, rows), sys.stdout, width=console.width)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table in which notes alone wrap."""
    from rich.text import Text

    table = empty_table(header, rows, wrapped="note", right=("bytes",))
    for row in rows:
        table.add_row(*map(Text, row))
    return table
