"""What guessing tokens by prompt lookup is worth: the same requests with and without, in turns, on one engine.

    python scripts/benchmark_speculation.py                                # the demo model on source code
    python scripts/benchmark_speculation.py --shape 135m --rounds 5        # random weights: the cost where nothing fits

The model's workloads: code that is continued, code that is written once more with a change (its text begins again
behind it), and tokens that are drawn at random, which repeat nothing. Each one request at a time and all together.
"""

from __future__ import annotations

import argparse
import inspect
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarking.workloads import SHAPES, write_checkpoint
from transformers import AutoTokenizer

import inference_shardformer
from inference_shardformer import InferenceConfig, InferenceEngine, InferenceShardformer, SamplingParams, ShardConfig

DEMO_MODEL = Path(inference_shardformer.__file__).parent / "demo_model"
WAYS = ("off", "prompt_lookup")
NUM_REQUESTS = 8


class Workload(NamedTuple):
    """Requests, and how their tokens are chosen."""

    prompts: list[list[int]]
    sampling: SamplingParams


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["demo", *SHAPES], default="demo", help="demo, or random weights of a shape")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=96)
    args = parser.parse_args()
    inference = InferenceConfig.model_validate({"dtype": "bf16", "scheduler": {"max_num_seqs": NUM_REQUESTS}})
    with (
        tempfile.TemporaryDirectory() as folder,
        InferenceShardformer(ShardConfig(device="cpu", threads_per_rank=args.threads), inference) as shardformer,
    ):
        if args.shape == "demo":
            path, workloads = DEMO_MODEL, _source_code(args.new_tokens)
        else:
            write_checkpoint(Path(folder), args.shape, torch.bfloat16)
            path, workloads = Path(folder), {"random": _random(args.new_tokens)}
        engine = shardformer.attach(shardformer.from_pretrained(path))
        print(
            f"{args.shape} model, bf16, {args.threads} threads, {args.rounds} rounds, {args.new_tokens} tokens each\n"
        )
        print(f"{'workload':<14}{'requests':<12}{'without':>10}{'with':>10}{'ratio':>8}{'right':>8}{'tokens':>8}")
        for name, workload in workloads.items():
            for size in (1, NUM_REQUESTS):
                _compare(engine, name, workload, size, args.rounds)


def _compare(engine: InferenceEngine, name: str, workload: Workload, size: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens: dict[str, list[Sequence[int]]] = {}
    num_drafts = num_right = 0
    for number in range(rounds + 1):  # the first one warms up
        for way in WAYS if number % 2 else reversed(WAYS):
            engine.update_config({"scheduler.speculation": way})
            began = time.perf_counter()
            outputs = [
                output
                for start in range(0, len(workload.prompts), size)
                for output in engine.generate(workload.prompts[start : start + size], workload.sampling)
            ]
            if number:
                seconds[way].append(time.perf_counter() - began)
            tokens[way] = [output.token_ids for output in outputs]
            num_drafts += sum(output.usage.num_draft_tokens for output in outputs)
            num_right += sum(output.usage.num_accepted_draft_tokens for output in outputs)
    count = sum(map(len, tokens["off"]))
    rates = [count / statistics.median(seconds[way]) for way in WAYS]
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    right = f"{num_right / num_drafts:.0%}" if num_drafts else "-"
    same = "equal" if tokens["off"] == tokens["prompt_lookup"] else "DIFFER"
    label = "one by one" if size == 1 else f"{size} at once"
    print(f"{name:<14}{label:<12}{rates[0]:>10.1f}{rates[1]:>10.1f}{ratio:>8.2f}{right:>8}{same:>8}", flush=True)


def _source_code(new_tokens: int) -> dict[str, Workload]:
    """Texts like those the demo model was trained on: modules of Python's standard library."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    source = inspect.getsource(argparse)
    pieces = [source[start : start + 1200] for start in range(2000, 2000 + NUM_REQUESTS * 4000, 4000)]
    greedy = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    drawn = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, temperature=1.5, seed=0)
    continued = [tokenizer.encode(piece) for piece in pieces]
    again = [tokenizer.encode(piece + "\n\n\n" + piece[:300]) for piece in pieces]
    return {
        "continue": Workload(continued, greedy),
        "again": Workload(again, greedy),
        "drawn": Workload(continued, drawn),
    }


def _random(new_tokens: int) -> Workload:
    """Random tokens, and more of them."""
    numbers = random.Random(0)
    prompts = [[numbers.randrange(5, 40000) for _ in range(64)] for _ in range(NUM_REQUESTS)]
    return Workload(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, temperature=1.0, seed=0))


if __name__ == "__main__":
    main()
