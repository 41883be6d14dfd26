"""`bench backends`: every attention backend that can serve, measured on this hardware behind a correctness gate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inference_shardformer.cli.bench_backends_view import show
from inference_shardformer.cli.models import check_before_launch, resolve_model
from inference_shardformer.cli.parser import add_model_options, sources_of
from inference_shardformer.cli.ranks import is_main_rank, launch, ranks_to_launch
from inference_shardformer.cli.report import UsageError
from inference_shardformer.cli.terminal import Terminal
from inference_shardformer.config.loader import gather, load_config
from inference_shardformer.errors import BackendUnavailableError

if TYPE_CHECKING:
    from inference_shardformer.cli.parser import Commands
    from inference_shardformer.config.sources import ConfigSources
    from inference_shardformer.tuning.buckets import Bucket

_DEFAULT_ROUNDS = "5"


def add_command(kinds: Commands) -> None:
    """Add `backends` to the kinds of `bench`."""
    parser = kinds.add_parser(
        "backends",
        help="compare the attention backends",
        description="Compare the attention backends for each phase, batch size and length, one layer a step. One that "
        "differs from the reference is disqualified. Exit code 3 if none is right everywhere.",
    )
    add_model_options(parser, is_required=False)
    parser.add_argument("--phases", metavar="P,...", help="of prefill,decode,mixed (default: all)")
    parser.add_argument("--batches", metavar="N,...", help="sequences in a step (default: 1,8)")
    parser.add_argument("--lengths", metavar="N,...", help="tokens of each sequence (default: 128,512)")
    parser.add_argument(
        "--repeat", default=_DEFAULT_ROUNDS, metavar="R", help=f"rounds; medians count (default: {_DEFAULT_ROUNDS})"
    )
    parser.add_argument("--plot", metavar="FILE.png|svg", help="draw the comparison (needs the extra `plot`)")
    parser.add_argument(
        "--save", metavar="PROFILE.json", help="keep the choice, for attention.backend=tuned and attention.profile"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Check everything, then measure here, or on as many ranks as were asked for."""
    buckets = _buckets(args)
    rounds = _numbers("--repeat", args.repeat)
    if len(rounds) != 1:
        raise UsageError(f"--repeat {args.repeat}: must be one integer", remedy="for example --repeat 5")
    sources = sources_of(args)
    shard = load_config(sources).shard
    model = None if args.model is None else resolve_model(args.model)
    _check_targets(args)
    if num_ranks := ranks_to_launch(shard):
        if model is not None:
            check_before_launch(model, num_ranks)
        return launch(words, num_ranks=num_ranks)
    return _compare(args, sources, model, buckets, rounds[0])


def _compare(
    args: argparse.Namespace, sources: ConfigSources, model: str | None, buckets: tuple[Bucket, ...], rounds: int
) -> int:
    from inference_shardformer.tuning.plot import draw
    from inference_shardformer.tuning.session import compare_backends

    terminal = Terminal(is_main=is_main_rank())
    comparisons = compare_backends(gather(sources), model, buckets, rounds=rounds)
    for comparison in comparisons:
        if args.json:
            terminal.record(comparison.to_json())
        elif terminal.is_main:
            show(comparison, sys.stdout)
    if any(comparison.choice is None for comparison in comparisons):
        return BackendUnavailableError.exit_code
    if terminal.is_main and args.plot:
        for comparison, path in zip(comparisons, _plot_paths(args.plot, len(comparisons)), strict=True):
            draw(comparison, path)
    if terminal.is_main and args.save:
        for comparison in comparisons:
            comparison.save(args.save)
        terminal.note(f"saved      {args.save}: use it with attention.backend=tuned, attention.profile={args.save}")
    return 0


def _plot_paths(path: str, number: int) -> list[str]:
    """One file for each group of layers: the path itself, or with `-1`, `-2`... before its suffix."""
    stem, dot, suffix = path.rpartition(".")
    return [path] if number == 1 else [f"{stem}-{place}{dot}{suffix}" for place in range(1, number + 1)]


def _check_targets(args: argparse.Namespace) -> None:
    from inference_shardformer.tuning.comparison import check_target
    from inference_shardformer.tuning.plot import check_plot

    if args.plot is not None:
        check_plot(args.plot)
    if args.save is not None:
        check_target(args.save)


def _buckets(args: argparse.Namespace) -> tuple[Bucket, ...]:
    from inference_shardformer.tuning.buckets import DEFAULT_BATCHES, DEFAULT_LENGTHS, PHASES, grid

    given = PHASES if args.phases is None else args.phases.split(",")
    phases = [phase for phase in PHASES if phase in given]
    unknown = [name for name in given if name not in PHASES]
    if unknown:
        raise UsageError(f"--phases {args.phases}: {unknown[0]!r} is none", remedy=f"of {', '.join(PHASES)}")
    batches = DEFAULT_BATCHES if args.batches is None else _numbers("--batches", args.batches)
    lengths = DEFAULT_LENGTHS if args.lengths is None else _numbers("--lengths", args.lengths)
    return grid(phases, batches, lengths)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Integers of at least 1, separated by commas."""
    words = text.split(",")
    if not all(word.isascii() and word.isdecimal() and int(word) >= 1 for word in words):
        raise UsageError(f"{option} {text}: must be integers of at least 1", remedy=f"for example {option} 1,8")
    return tuple(int(word) for word in words)
