"""What the prefix cache saves where requests begin alike, and what it costs where they do not.

Engines with and without it take turns in every round, on new token ids. Prints medians, and the median of the rounds'
ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarking.workloads import SHAPES, Workload, ragged, write_checkpoint

from inference_shardformer import InferenceEngine, InferenceShardformer, SamplingParams
from inference_shardformer.config.sources import ConfigSources

SYSTEM_LENGTH, QUESTION_LENGTH, ANSWER_LENGTH = 1024, 32, 16
SIDES = ("off", "on")


class Run(NamedTuple):
    """Seconds of one workload, of the mean first token in it, and the share of the prompts that was found."""

    seconds: float
    first_token: float
    found: float


class Case(NamedTuple):
    """Requests of a round, made of its number; `prepare` is what the engines have served just before."""

    work: Callable[[int], Workload]
    prepare: Callable[[int], Workload] | None = None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = cases_of(int(str(SHAPES[args.shape]["vocab_size"])), args.requests)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_sides:
        write_checkpoint(Path(folder), args.shape, torch.bfloat16)
        engines = {side: open_sides.enter_context(engine_of(folder, side, args)) for side in SIDES}
        for name, case in ((name, case) for name, case in cases.items() if args.only in name):
            measure(engines, case, -1)  # warm up
            report(name, [measure(engines, case, number) for number in range(args.rounds)])


def engine_of(folder: str, prefix_caching: str, args: argparse.Namespace) -> InferenceEngine:
    """An engine with or without the cache, which holds less than what the rounds bring: blocks are reclaimed."""
    blocks = args.requests * (SYSTEM_LENGTH + QUESTION_LENGTH + ANSWER_LENGTH + 16) // 16
    sets = (f"cache.prefix_caching={prefix_caching}", f"cache.num_blocks={blocks}", "cache.block_size=16")
    limits = (f"scheduler.max_num_seqs={args.requests}", f"shard.threads_per_rank={args.threads}")
    shardformer = InferenceShardformer(sources=ConfigSources(environ={}, sets=(*sets, *limits)))
    return shardformer.attach(shardformer.from_pretrained(folder))


def cases_of(vocab_size: int, num_requests: int) -> dict[str, Case]:
    """Requests that share a system prompt, which is new or known; a conversation's next turn; and strangers."""

    def ids(length: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed + 10**6)
        return torch.randint(0, vocab_size, (length,), generator=generator).tolist()

    def asked(number: int, *, first: int, count: int) -> Workload:
        system = ids(SYSTEM_LENGTH, 1000 * number)
        prompts = [system + ids(QUESTION_LENGTH, 1000 * number + first + i) for i in range(count)]
        return Workload(prompts, [ANSWER_LENGTH] * count)

    def one(number: int) -> Workload:
        return asked(number, first=1, count=1)

    def together(number: int) -> Workload:
        return asked(number, first=2, count=num_requests)

    return {
        f"{num_requests} requests, a new system prompt": Case(together),
        f"{num_requests} requests, a known system prompt": Case(together, prepare=one),
        "1 request, a known system prompt": Case(lambda number: asked(number, first=2, count=1), prepare=one),
        "32 ragged requests, nothing in common": Case(
            lambda number: ragged(32, vocab_size=vocab_size, seed=number + 9)
        ),
    }


def measure(engines: Mapping[str, InferenceEngine], case: Case, number: int) -> dict[str, Run]:
    """One round; every other one begins with the other side."""
    runs = {}
    for side in SIDES if number % 2 else reversed(SIDES):
        if case.prepare is not None:
            serve(engines[side], case.prepare(number))
        runs[side] = serve(engines[side], case.work(number))
    return runs


def serve(engine: InferenceEngine, work: Workload) -> Run:
    """All requests at once."""
    sampling = [SamplingParams(max_new_tokens=count, ignore_eos=True) for count in work.max_new_tokens]
    first: dict[int, float] = {}
    before = engine.prefix_cache_stats
    started = time.perf_counter()
    for chunk in engine.stream(work.prompts, sampling):
        first.setdefault(chunk.index, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    after = engine.prefix_cache_stats
    if before is None or after is None:
        return Run(seconds, statistics.mean(first.values()), 0.0)
    found = after.num_cached_tokens - before.num_cached_tokens
    return Run(seconds, statistics.mean(first.values()), found / sum(map(len, work.prompts)))


def report(name: str, rounds: list[dict[str, Run]]) -> None:
    """One line for each side, and the ratios."""
    print(name)
    for side in SIDES:
        seconds, first, found = (
            statistics.median(column) for column in zip(*(each[side] for each in rounds), strict=True)
        )
        print(f"  {side:<4} {seconds:8.3f} s   first token {first:7.3f} s   found {found:4.0%}")
    for what, index in (("seconds", 0), ("first token", 1)):
        ratios = sorted(each["off"][index] / each["on"][index] for each in rounds)
        print(f"  {what} off / on: {statistics.median(ratios):.2f}   ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


if __name__ == "__main__":
    main()
