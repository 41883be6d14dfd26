"""`verify`: proves that a policy shards a model right, or names the first module where it does not."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inference_shardformer.cli.models import resolve_model
from inference_shardformer.cli.policies import load_policy
from inference_shardformer.cli.ranks import is_launched, is_main_rank, launch
from inference_shardformer.cli.report import EXIT_INTERNAL, UsageError
from inference_shardformer.cli.terminal import Terminal

if TYPE_CHECKING:
    from inference_shardformer.cli.parser import Commands


def add_command(commands: Commands) -> None:
    """Add `verify` to the parser."""
    parser = commands.add_parser(
        "verify",
        help="prove that a sharded model equals the unsharded one",
        description="Compares plans, weights, the activations of every module, and logits of the sharded model with "
        "those of Hugging Face's, in fp32, and names the first module that differs. Exits with 1 where one does.",
    )
    parser.add_argument("--model", required=True, metavar="PATH|HUB_ID|demo", help="what to verify")
    parser.add_argument("--tp", type=int, default=2, metavar="N", help="number of ranks (default: 2)")
    parser.add_argument("--policy", metavar="MODULE:CLASS", help="a policy of your own; FILE.py:CLASS works as well")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--simulate", action="store_true", help="ranks are threads of this process (default)")
    where.add_argument("--ranks", action="store_true", help="ranks are processes, each with the whole model beside")
    parser.add_argument("--attention-backend", default="auto", metavar="NAME", help="verify with this one")
    parser.add_argument("--json", action="store_true", help="machine-readable results on standard output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Verify, print the report on the main rank, and say by the exit status whether it passed."""
    if args.tp < 1:
        raise UsageError(f"--tp {args.tp}: at least 1 rank is needed", remedy="ask for --tp 2")
    model = resolve_model(args.model)
    policy = None if args.policy is None else load_policy(args.policy)
    if args.ranks and args.tp > 1 and not is_launched():
        return launch(words, num_ranks=args.tp)
    from inference_shardformer import verify_sharding

    report = verify_sharding(
        model,
        tp_size=args.tp,
        policy=policy,
        ranks="real" if args.ranks else "simulated",
        attention_backend=args.attention_backend,
    )
    terminal = Terminal(is_main=is_main_rank())
    if args.json:
        terminal.record(report.to_json())
    else:
        terminal.text(f"{report}\n")
    return 0 if report.passed else EXIT_INTERNAL
