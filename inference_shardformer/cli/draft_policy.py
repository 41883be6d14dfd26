"""`draft-policy`: writes the source of a policy for a decoder that has none, and proves it on a small model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inference_shardformer.cli.models import resolve_model
from inference_shardformer.cli.ranks import is_main_rank
from inference_shardformer.cli.report import EXIT_INTERNAL
from inference_shardformer.cli.terminal import Terminal

if TYPE_CHECKING:
    from inference_shardformer.cli.parser import Commands
    from inference_shardformer.drafting.draft import Draft


def add_command(commands: Commands) -> None:
    """Add `draft-policy` to the parser."""
    parser = commands.add_parser(
        "draft-policy",
        help="write a policy for a decoder that has none",
        description="Writes the Python source of a policy to standard output, drafted from the module tree and from "
        "Hugging Face's tensor-parallel plan, and verifies it on a small model of the same architecture. Reads no "
        "weights. What it cannot decide makes the policy refuse; it exits with 1 then, or where the draft is wrong.",
    )
    parser.add_argument("--model", required=True, metavar="PATH|HUB_ID", help="a checkpoint; its weights are not read")
    parser.add_argument("--no-verify", action="store_true", help="write the source alone")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Draft, print the source, and report on standard error."""
    from inference_shardformer import draft_policy

    draft = draft_policy(resolve_model(args.model), verifies=not args.no_verify)
    terminal = Terminal(is_main=is_main_rank())
    terminal.text(draft.source)
    _report(draft, terminal, is_asked=not args.no_verify)
    return 0 if draft.is_verified or (args.no_verify and not draft.table.undecided) else EXIT_INTERNAL


def _report(draft: Draft, terminal: Terminal, *, is_asked: bool) -> None:
    for question in draft.table.undecided:
        terminal.note(f"undecided  {question}")
    if draft.table.undecided:
        terminal.note("refuses    settle the lines marked UNDECIDED, then run `inference-shardformer verify --policy`")
    elif not is_asked:
        terminal.note("not verified; run `inference-shardformer verify --policy`")
    elif draft.is_verified:
        sizes = ", ".join(str(report.tp_size) for report in draft.reports)
        terminal.note(f"verified   on {sizes} simulated ranks with a small model of the same architecture")
    else:
        terminal.note(f"WRONG      {draft.reports[-1]}")
