"""The command `inference-shardformer`: parse, run one sub-command, turn every error into a block and an exit code."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from inference_shardformer.cli import bench as bench_command
from inference_shardformer.cli import doctor as doctor_command
from inference_shardformer.cli import draft_policy as draft_policy_command
from inference_shardformer.cli import explain as explain_command
from inference_shardformer.cli import generate as generate_command
from inference_shardformer.cli import migrate as migrate_command
from inference_shardformer.cli import plan as plan_command
from inference_shardformer.cli import serve as serve_command
from inference_shardformer.cli import verify as verify_command
from inference_shardformer.cli.parser import ArgumentParser, add_version
from inference_shardformer.cli.ranks import has_launcher_of_ours, is_main_rank, name_of_other_rank, note_reported
from inference_shardformer.cli.report import EXIT_INTERNAL, EXIT_INTERRUPTED, report_error, unexpected
from inference_shardformer.cli.streams import open_standard_streams
from inference_shardformer.distributed.leaving import run_and_leave
from inference_shardformer.errors import InferenceShardformerError

_MAIN_RANK_SPEAKS_S = 3.0  # more than a rank has left once the launcher ends it


def run_as_program(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command line and end the process with its code, without the second that tearing down torch takes."""
    open_standard_streams()
    run_and_leave(lambda: sys.exit(main(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code and never raises."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except BrokenPipeError:  # the reader of our output has gone; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        note_reported(EXIT_INTERNAL)
        return EXIT_INTERNAL


def build_parser() -> ArgumentParser:
    """The parser with every sub-command."""
    parser = ArgumentParser(
        prog="inference-shardformer", description="Shard a Hugging Face decoder across ranks and generate with it."
    )
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=ArgumentParser)
    generate_command.add_command(commands)
    serve_command.add_command(commands)
    bench_command.add_command(commands)
    doctor_command.add_command(commands)
    explain_command.add_command(commands)
    migrate_command.add_command(commands)
    plan_command.add_command(commands)
    verify_command.add_command(commands)
    draft_policy_command.add_command(commands)
    return parser


def _run(words: Sequence[str]) -> int:
    """Run, and report what goes wrong."""
    try:
        args = build_parser().parse_args(words)
        code = int(args.run(args, words))
        if is_main_rank():
            note_reported(code)
        return code
    except SystemExit as exc:  # --help and --version
        return exc.code if isinstance(exc.code, int) else 0
    except KeyboardInterrupt:
        if is_main_rank() and not has_launcher_of_ours():
            print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except InferenceShardformerError as exc:
        return _fail(exc, words)
    except Exception as exc:  # noqa: BLE001 - the process boundary
        return _fail(unexpected(exc), words)


def _fail(error: InferenceShardformerError, words: Sequence[str]) -> int:
    """Report, on the main rank or for this rank alone, and return the exit code."""
    if not is_main_rank() and not error.is_shared:
        # Most often the main rank has the same error, says so and ends, and the launcher then ends this rank.
        time.sleep(_MAIN_RANK_SPEAKS_S)
    if is_main_rank() or not error.is_shared:
        report_error(error, as_json="--json" in words, debug="--debug" in words, speaker=name_of_other_rank())
        note_reported(error.exit_code)
    return error.exit_code


if __name__ == "__main__":
    run_as_program()
