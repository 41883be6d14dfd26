"""From nothing to the first token: a fresh process imports, loads a checkpoint and generates, phase by phase.

Ours and Hugging Face's `from_pretrained` and `generate` take turns, each round in new processes. Seconds are counted
from before the interpreter starts; medians are printed, and beside them processor seconds, which other work on the
machine disturbs less. With `--limit` it ends with code 1 if our median is above.

    python scripts/benchmark_start.py --shape 135m --rounds 5 --limit 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROMPT = list(range(100, 116))
IMPORT, CONFIGURE, LOAD, FIRST_TOKEN = "import", "configure, import transformers", "load weights", "first token"
_BEGAN = "BENCHMARK_START_BEGAN"  # of the child: `time.perf_counter()` of its parent, one clock for all processes

Phases = dict[str, tuple[float, float]]  # seconds, and processor seconds of this process


class Stopwatch:
    """Phases that follow one another."""

    def __init__(self, began: float) -> None:
        self.phases: Phases = {}
        self._last = (began, 0.0)

    def end(self, phase: str, at: tuple[float, float] | None = None) -> None:
        """A phase has ended, now or at a moment noted before."""
        now = at or (time.perf_counter(), time.process_time())
        self.phases[phase] = (now[0] - self._last[0], now[1] - self._last[1])
        self._last = now


def ours(folder: str, threads: int, watch: Stopwatch) -> None:
    """Import, load, put an engine over it, and generate one token."""
    from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig

    watch.end(IMPORT)
    first: list[tuple[float, float]] = []

    def note(done: int, total: int) -> None:
        if not first:
            first.append((time.perf_counter(), time.process_time()))

    ranks = ShardConfig(device="cpu", threads_per_rank=threads)
    with InferenceShardformer(ranks, InferenceConfig(dtype="bf16")) as shardformer:
        model = shardformer.from_pretrained(folder, progress=note)
        watch.end(CONFIGURE, first[0])
        watch.end(LOAD)
        engine = shardformer.attach(model)
        engine.generate([PROMPT], SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True))
        watch.end(FIRST_TOKEN)


def hugging_face(folder: str, threads: int, watch: Stopwatch) -> None:
    """The same with `from_pretrained` and `generate`; what it decides and what it loads cannot be told apart."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    watch.end(IMPORT)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    watch.end(LOAD)
    ids = torch.tensor([PROMPT])
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=1, pad_token_id=0)
    watch.end(FIRST_TOKEN)


SIDES: dict[str, Callable[[str, int, Stopwatch], None]] = {"ours": ours, "hugging-face": hugging_face}


def run_side(name: str, folder: str, threads: int) -> None:
    """What a fresh process does."""
    watch = Stopwatch(float(os.environ[_BEGAN]))
    watch.end("interpreter")
    SIDES[name](folder, threads, watch)
    print(json.dumps(watch.phases), flush=True)


def start_side(name: str, folder: str, threads: int) -> Phases:
    """The phases of one fresh process."""
    command = [sys.executable, __file__, "--side", name, folder, "--threads", str(threads)]
    environment = os.environ | {_BEGAN: str(time.perf_counter()), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    phases: Phases = json.loads(done.stdout.splitlines()[-1])
    return phases


def report(name: str, rounds: list[Phases]) -> float:
    """Print the medians of one side; returns that of the whole."""

    def column(phase: str, which: int) -> float:
        return statistics.median(each[phase][which] for each in rounds)

    totals = [[sum(times[which] for times in each.values()) for each in rounds] for which in (0, 1)]
    print(f"\n{name}: medians of {len(rounds)} fresh processes\n  {'':30} seconds   processor seconds")
    for phase in rounds[0]:
        print(f"  {phase:30} {column(phase, 0):7.3f}   {column(phase, 1):7.3f}")
    median, processor = (statistics.median(values) for values in totals)
    print(f"  {'in all':30} {median:7.3f}   {processor:7.3f}   least {min(totals[0]):.3f} and {min(totals[1]):.3f}")
    return median


def write_checkpoint(shape: str, folder: str) -> None:
    """Write random weights, in a process of its own: this one stays small."""
    lines = "import sys, torch; from pathlib import Path; from benchmarking.workloads import write_checkpoint; "
    code = lines + "write_checkpoint(Path(sys.argv[2]), sys.argv[1], torch.bfloat16)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code, shape, folder], env=environment, check=True)


def main() -> int:
    """Let the sides take turns, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135m", help="of benchmarking.workloads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, help="seconds that our median may take")
    parser.add_argument("--side", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(*args.side, args.threads)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(args.shape, folder)
        rounds: dict[str, list[Phases]] = {name: [] for name in SIDES}
        for _ in range(args.rounds + 1):
            for name, phases in rounds.items():
                phases.append(start_side(name, folder, args.threads))
    medians = {name: report(name, phases[1:]) for name, phases in rounds.items()}  # the first round warms file caches
    print(f"\nHugging Face takes {medians['hugging-face'] / medians['ours']:.2f} x our time")
    print(json.dumps({"shape": args.shape, "threads": args.threads, "rounds": rounds}))
    return 1 if args.limit is not None and medians["ours"] > args.limit else 0


if __name__ == "__main__":
    sys.exit(main())
