"""The CPU path beside Hugging Face, and beside any other engine that speaks the protocol of `benchmarking.sides`.

Every side is a process of its own with the same random weights; in each round the sides take turns, and medians over
rounds and ratios of round against round are printed. Greedy, end of sequence ignored.

    python scripts/benchmark_cpu.py --shape 135m --rounds 5
    python scripts/benchmark_cpu.py --shape 135m --peer llama.cpp="/path/to/python serve_llama.py {folder}"

Sections: compare (decode, prefill, ragged requests), busy (the same beside a foreign busy process), tp2 (two ranks of
one thread against one rank of two), roofline (linear kernels against a read probe and torch), memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from benchmarking.roofline import report_roofline
from benchmarking.sides import Side, ratio, take_turns
from benchmarking.workloads import SHAPES, Workload, ragged, single, write_checkpoint

HERE = Path(__file__).parent
OURS = "inference-shardformer"
DECODED = 96
CACHE_TOKENS = 2048  # of the section on memory
SECTIONS = ("compare", "busy", "tp2", "roofline", "memory")


def main() -> None:
    """Run the asked sections."""
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), args.shape, torch.bfloat16)
        print(f"{args.shape} LLaMA shape, bf16, {args.threads} threads, medians of {args.rounds} rounds\n")
        if "roofline" in args.section:
            report_roofline(args.shape, threads=args.threads, rounds=args.rounds)
        if "compare" in args.section:
            _compare(folder, args)
        if "tp2" in args.section:
            _tp2(folder, args)
        if "busy" in args.section:
            _busy(folder, args)
        if "memory" in args.section:
            _memory(folder, args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--section", choices=SECTIONS, action="append", help="default: all")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="{folder}: the checkpoint")
    parser.add_argument("--no-hf", action="store_true", help="leave Hugging Face out")
    args = parser.parse_args()
    args.section = args.section or list(SECTIONS)
    return args


def _works(shape: str, requests: int = 32) -> dict[str, Workload]:
    vocab_size = int(str(SHAPES[shape]["vocab_size"]))
    return {
        "first": single(32, 1, vocab_size=vocab_size),
        "decode": single(32, 1 + DECODED, vocab_size=vocab_size),
        "prefill": single(1024, 1, vocab_size=vocab_size),
        "ragged": ragged(requests, vocab_size=vocab_size),
    }


def _ours(folder: str, threads: int, name: str = OURS, *, sets: Sequence[str] = (), ranks: int = 1) -> Side:
    options = [part for each in ("inference.scheduler.max_num_seqs=16", *sets) for part in ("--set", each)]
    command = [sys.executable, str(HERE / "benchmark_side_ours.py"), folder, "--threads", str(threads), *options]
    return Side(name, command, ranks, {"OMP_NUM_THREADS": str(threads)})


def _hugging_face(folder: str, threads: int, mode: str) -> Side:
    command = [sys.executable, str(HERE / "benchmark_side_hf.py"), folder, "--threads", str(threads), "--mode", mode]
    return Side(f"hf {mode}", command, 1, {"OMP_NUM_THREADS": str(threads)})


@contextmanager
def _started(sides: Sequence[Side]) -> Iterator[Sequence[Side]]:
    try:
        for number, side in enumerate(sides):
            side.start(29561 + number)
        yield sides
    finally:
        for side in sides:
            side.stop()


def _compare(folder: str, args: argparse.Namespace) -> None:
    """Decode, prefill and ragged requests of all sides."""
    sides = [_ours(folder, args.threads)]
    for name, value in (("uncompressed", "compression=none"), ("int8", "quantization=int8")):
        sides.append(_ours(folder, args.threads, f"{OURS} {name}", sets=[f"inference.weights.{value}"]))
    if not args.no_hf:
        sides += [_hugging_face(folder, args.threads, mode) for mode in ("static", "continuous")]
    for peer in args.peer:
        name, _, command = peer.partition("=")
        sides.append(Side(name, shlex.split(command.format(folder=folder)), 1, {"OMP_NUM_THREADS": str(args.threads)}))
    works = _works(args.shape)
    with _started(sides):
        seconds = take_turns(sides, works, args.rounds)
    _print_table("tokens per second, and how many times faster than that side we are", sides, works, seconds)


def _print_table(
    title: str, sides: Sequence[Side], works: dict[str, Workload], seconds: dict[str, dict[str, list[float]]]
) -> None:
    spent = {**seconds, "decode": {side.name: _decode_seconds(seconds, side.name) for side in sides}}
    tokens = {"decode": DECODED, "prefill": 1024}
    if "ragged" in works:
        tokens["ragged"] = works["ragged"].generated
    print(title)
    print(f"  {'':34}" + "".join(f"{name:>20}" for name in tokens) + f"{'peak MiB':>12}")
    for side in sides:
        cells = []
        for name, count in tokens.items():
            speed = count / statistics.median(spent[name][side.name])
            cells.append(f"{speed:11.1f} x{ratio(spent[name][sides[0].name], spent[name][side.name]):6.2f} ")
        print(f"  {side.name:34}" + "".join(f"{cell:>20}" for cell in cells) + f"{side.peak_rss_mib:12.0f}")
    print(json.dumps({"seconds": seconds}) + "\n", flush=True)


def _decode_seconds(seconds: dict[str, dict[str, list[float]]], name: str) -> list[float]:
    """What the tokens after the first one took."""
    return [whole - first for whole, first in zip(seconds["decode"][name], seconds["first"][name], strict=True)]


def _tp2(folder: str, args: argparse.Namespace) -> None:
    """Two ranks of one thread each against one rank of two threads; ragged requests are left out."""
    if int(str(SHAPES[args.shape]["num_attention_heads"])) % 2:
        print(
            f"tensor parallel: the heads of the {args.shape} shape cannot be cut over two ranks; try another --shape\n"
        )
        return
    works = {name: work for name, work in _works(args.shape).items() if name != "ragged"}
    sides = [_ours(folder, 2, "tp 1, two threads"), _ours(folder, 1, "tp 2, one thread each", ranks=2)]
    with _started(sides):
        seconds = take_turns(sides, works, args.rounds)
    _print_table("tensor parallel: how many times faster the first is", sides, works, seconds)


def _busy(folder: str, args: argparse.Namespace) -> None:
    """The same side alone, and beside a process that keeps one core busy."""
    side = _ours(folder, args.threads)
    works = {name: work for name, work in _works(args.shape).items() if name in ("decode", "ragged")}
    quiet: dict[str, list[float]] = {name: [] for name in works}
    busy: dict[str, list[float]] = {name: [] for name in works}
    with _started([side]):
        for _ in range(args.rounds):
            for name, work in works.items():
                quiet[name].append(side.run(work))
                with _foreign_process():
                    busy[name].append(side.run(work))
    for name in works:
        fall = ratio(quiet[name], busy[name])
        print(f"busy machine, one foreign process on one core: {name} falls by x {fall:.2f}")
    print()


@contextmanager
def _foreign_process() -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _spin() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    while True:
        pass


def _memory(folder: str, args: argparse.Namespace) -> None:
    """Peak memory beside what weights and cache need; one of the prompts fills every block of the cache."""
    side = _ours(folder, args.threads, sets=[f"inference.cache.num_blocks={CACHE_TOKENS // 16}"])
    vocab_size = int(str(SHAPES[args.shape]["vocab_size"]))
    with _started([side]):
        side.run(single(CACHE_TOKENS - 16, 1, vocab_size=vocab_size))
        side.run(_works(args.shape)["ragged"])
    shape = {name: int(str(value)) for name, value in SHAPES[args.shape].items() if not isinstance(value, bool)}
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    cache = 2 * 2 * shape["num_hidden_layers"] * CACHE_TOKENS * shape["num_key_value_heads"] * head_dim / 2**20
    weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 2**20
    rest = side.peak_rss_mib - weights - cache
    print(
        f"memory: peak {side.peak_rss_mib:.0f} MiB = weights {weights:.0f} + cache {cache:.0f} + process {rest:.0f}, "
        f"of which pages of library files {side.file_rss_mib:.0f}\n"
    )


if __name__ == "__main__":
    main()
