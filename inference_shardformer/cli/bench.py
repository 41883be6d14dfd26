"""`bench throughput`: tokens per second of a fixed workload, measured after a warm-up, one JSON object a repeat."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inference_shardformer.cli import bench_backends as backends_command
from inference_shardformer.cli.memory import peak_rss_bytes
from inference_shardformer.cli.models import check_before_launch, resolve_model
from inference_shardformer.cli.parser import add_model_options, sources_of
from inference_shardformer.cli.ranks import is_main_rank, launch, ranks_to_launch
from inference_shardformer.cli.report import UsageError
from inference_shardformer.cli.session import Session, open_session
from inference_shardformer.cli.terminal import Terminal
from inference_shardformer.cli.workload import Workload, read_workload
from inference_shardformer.config.loader import load_config
from inference_shardformer.config.sources import Flag

if TYPE_CHECKING:
    from inference_shardformer.cli.parser import ArgumentParser, Commands

_MAX_NUM_SEQS = "inference.scheduler.max_num_seqs"


def add_command(commands: Commands) -> None:
    """Add `bench throughput` to the parser."""
    bench = commands.add_parser("bench", help="measure", description="Measure a model on this machine.")
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=type(bench))
    parser: ArgumentParser = kinds.add_parser(
        "throughput",
        help="tokens per second of a workload",
        description="Greedy generation of a workload, end-of-sequence tokens ignored, after one warm-up on other ids.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--workload",
        required=True,
        metavar="W.json",
        help='{"max_running": N, "requests": [{"prompt": [ids], "max_new": N}, ...]}',
    )
    parser.add_argument("--repeat", default="1", metavar="R", help="how often to measure (default: 1)")
    parser.set_defaults(run=run)
    backends_command.add_command(kinds)


def run(args: argparse.Namespace, words: Sequence[str]) -> int:
    """Check everything, then measure here, or on as many ranks as were asked for."""
    if not args.repeat.isdecimal() or int(args.repeat) < 1:
        raise UsageError(f"--repeat {args.repeat}: must be an integer, at least 1", remedy="for example --repeat 3")
    workload = read_workload(args.workload)
    running = Flag(f"max_running of {args.workload}", _MAX_NUM_SEQS, str(workload.max_running))
    sources = sources_of(args, extra=(running,))
    model = resolve_model(args.model)
    if num_ranks := ranks_to_launch(load_config(sources).shard):
        check_before_launch(model, num_ranks)
        return launch(words, num_ranks=num_ranks)
    terminal = Terminal(is_main=is_main_rank())
    with open_session(model, sources, terminal, with_tokenizer=False) as session:
        _measure(session, workload.shifted())
        for repeat in range(int(args.repeat)):
            result = _measure(session, workload)
            terminal.note(
                f"repeat {repeat + 1}   {result['generated_tokens']} tokens in {result['seconds']:.3f} s: "
                f"{result['generated_tokens_per_second']:.1f} tokens/s"
            )
            if args.json:
                terminal.record(result)
    return 0


def _measure(session: Session, workload: Workload) -> dict[str, int | float]:
    """Run the workload once."""
    from inference_shardformer import SamplingParams

    sampling = [SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True) for new in workload.max_new]
    first_token = 0.0
    num_generated = 0
    session.engine.reset_prefix_cache()  # else a repeat would find what the one before has computed
    started = time.perf_counter()
    for chunk in session.engine.stream(workload.prompts, sampling):
        if chunk.index == 0 and not first_token:
            first_token = time.perf_counter() - started
        num_generated += len(chunk.token_ids)
    seconds = time.perf_counter() - started
    peaks = session.shardformer.group.all_gather_bytes(str(peak_rss_bytes()).encode())
    return {
        "generated_tokens": num_generated,
        "prompt_tokens": sum(len(prompt) for prompt in workload.prompts),
        "seconds": seconds,
        "generated_tokens_per_second": num_generated / seconds,
        "time_to_first_token_s": first_token,
        "peak_rss_bytes": max(int(peak) for peak in peaks),
    }
