"""`migrate`: ColossalAI's configuration, or an older one of ours, becomes the current schema, with a report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from inference_shardformer.cli.ranks import is_main_rank
from inference_shardformer.cli.terminal import Terminal
from inference_shardformer.config.migrate.migrate import migrate_file
from inference_shardformer.config.migrate.writer import suffix_of
from inference_shardformer.errors import ConfigError

if TYPE_CHECKING:
    from inference_shardformer.cli.parser import Commands

_EXIT_INCOMPLETE = ConfigError.exit_code


def add_command(commands: Commands) -> None:
    """Add `migrate` to the parser."""
    parser = commands.add_parser(
        "migrate",
        help="turn ColossalAI's or an older configuration into the current schema",
        description="Turn ColossalAI's InferenceConfig and ShardConfig, or an older configuration of ours, into the "
        "current schema. A Python file is parsed, never run. The report goes to standard error; exits with 2, and "
        "writes nothing, when something that has an effect was not carried.",
    )
    parser.add_argument("file", metavar="FILE", help="a .py, .yaml, .yml, .json or .toml file")
    parser.add_argument("--to", metavar="OUT", help="the file to write, its suffix says the format; default: YAML here")
    parser.add_argument(
        "--call",
        action="append",
        default=[],
        type=int,
        dest="lines",
        metavar="LINE",
        help="which configuration of a Python file that holds several; repeatable",
    )
    parser.add_argument("--partial", action="store_true", help="write what was carried although something was not")
    parser.add_argument("--json", action="store_true", help="the report and the settings as one object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Migrate, tell, and write where that is allowed."""
    from inference_shardformer.resolving.options import OptionOwners

    suffix = suffix_of(args.to) if args.to else ".yaml"
    migration = migrate_file(args.file, suffix=suffix, lines=args.lines, plugins=OptionOwners())
    terminal = Terminal(is_main=is_main_rank())
    is_wanted = migration.is_complete or args.partial
    if args.to and is_wanted and terminal.is_main:
        _write(args.to, migration.text)
    written = args.to if is_wanted else None
    terminal.note(migration.as_text())
    if args.json:
        terminal.record(migration.as_object(written=written))
    elif is_wanted and not args.to:
        terminal.text(migration.text)
    if not is_wanted:
        terminal.note("\nnothing was written; correct what is named above, or take the rest with --partial")
    elif args.to:
        terminal.note(f"\nwritten to {args.to}")
    return 0 if migration.is_complete else _EXIT_INCOMPLETE


def _write(name: str, text: str) -> None:
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"--to {name}: cannot be written ({exc.strerror})", remedy="check the path") from exc
