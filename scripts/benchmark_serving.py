"""What the server costs: concurrent streaming clients over HTTP, beside `engine.generate` with the same requests.

Both sides hold the model at the same time and take turns; all requests of a round are sent at once. Medians over the
rounds are printed: tokens per second of both, how many times longer the server takes, the time to the first token and
that between two tokens as clients see it. Clients run in this process, on the same cores.

    python scripts/benchmark_serving.py --shape 135m --clients 1 16 --tp 1 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from benchmarking.http_clients import Answer, send_all
from benchmarking.sides import Side, ratio
from benchmarking.workloads import SHAPES, Workload, write_checkpoint
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

_SCRIPTS = Path(__file__).parent


def main() -> None:
    """Run the rounds and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="135m")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, args.shape, torch.bfloat16)
        write_tokenizer(folder, int(str(SHAPES[args.shape]["vocab_size"])))
        threads = max(1, args.threads // args.tp)
        command = [sys.executable, str(_SCRIPTS / "benchmark_side_ours.py"), name, "--threads", str(threads)]
        engine = Side("engine", command, ranks=args.tp, environment={"OMP_NUM_THREADS": str(threads)})
        try:
            engine.start()
            with server(folder, tp=args.tp, threads=threads) as url:
                for count in args.clients:
                    compare(engine, url, name, workload(count, args), args.rounds)
        finally:
            engine.stop()


def workload(count: int, args: argparse.Namespace) -> Workload:
    """Equally long requests with random tokens."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(0, 256, (count, args.prompt_length), generator=generator)
    return Workload(ids.tolist(), [args.new_tokens] * count)


def compare(engine: Side, url: str, model: str, work: Workload, rounds: int) -> None:
    """Let both sides take turns and print a line."""
    direct: list[float] = []
    served: list[float] = []
    answers: list[Answer] = []
    for number in range(rounds + 1):
        seconds = engine.run(work)
        seconds_served, round_answers = send_all(url, model, work)
        num_tokens = sum(answer.num_tokens for answer in round_answers)
        if num_tokens != work.generated:
            raise SystemExit(f"the server generated {num_tokens} tokens instead of {work.generated}")
        if number:  # the first round warms up
            direct.append(seconds)
            served.append(seconds_served)
            answers += round_answers
    first = statistics.median(answer.first_s for answer in answers)
    gap = statistics.median([gap for answer in answers for gap in answer.gaps_s])
    direct_rate, served_rate = (work.generated / statistics.median(side) for side in (direct, served))
    print(
        f"{len(work.prompts):3d} clients: engine {direct_rate:8.1f} tokens/s, server {served_rate:8.1f} tokens/s, "
        f"{ratio(direct, served):.2f} times as long; first token {first * 1e3:.1f} ms, next {gap * 1e3:.2f} ms",
        flush=True,
    )


@contextmanager
def server(folder: Path, *, tp: int, threads: int) -> Iterator[str]:
    """A server of the checkpoint; its URL."""
    words = [sys.executable, "-m", "inference_shardformer.cli.main", "serve", "--model", str(folder), "--json"]
    words += ["--device", "cpu", "--port", "0", "--tp", str(tp), "--set", f"shard.threads_per_rank={threads}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise SystemExit(f"the server ended: run it by hand to see why: {' '.join(words)}")
            yield json.loads(line)["url"]
        finally:
            process.terminate()


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer with a word for every id, so that every token has a text to send."""
    plain = Tokenizer(WordLevel({f"t{token_id} ": token_id for token_id in range(vocab_size)}, unk_token="t0 "))
    plain.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder)


if __name__ == "__main__":
    main()
