"""What the live configuration costs a step: limits read from the store, with and without subscribers, or from a plain
object.

One engine with random weights decodes a batch; the three sides take turns step by step, and medians and ratios are
printed, then the time of a single read.

    python scripts/benchmark_live_config.py --layers 4 --batch 4 --steps 600
"""

from __future__ import annotations

import argparse
import json
import statistics
import timeit
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from inference_shardformer import InferenceConfig, InferenceEngine, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.config.snapshot import ConfigSnapshot

SIDES = ("plain attribute", "store", "store with subscribers")
NUM_SUBSCRIBERS = 16
NUM_WARM_UP = 40
NUM_READS = 200_000


@dataclass
class PlainConfig:
    """Stands in the place of the store: the snapshot is an attribute of the object."""

    current: ConfigSnapshot


@dataclass
class StepTimes:
    """Median seconds of a step on each side, and the median of its ratio to the plain side of the same round."""

    seconds: dict[str, float]
    ratios: dict[str, float]


def make_engine(
    layers: int, hidden: int, *, threads: int, batch: int, max_len: int
) -> tuple[InferenceShardformer, InferenceEngine]:
    """An engine over random fp32 weights, with room for `batch` requests of `max_len` tokens."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=max_len,
        eos_token_id=None,
    )
    shardformer = InferenceShardformer(
        ShardConfig(device="cpu", threads_per_rank=threads),
        InferenceConfig.model_validate({"dtype": "fp32", "scheduler": {"max_num_seqs": batch}}),
    )
    model, _ = shardformer.optimize(LlamaForCausalLM(config))
    return shardformer, shardformer.attach(model)


def time_steps(engine: InferenceEngine, *, batch: int, steps: int) -> StepTimes:
    """Time decode steps, one of each side in every round; the order changes from round to round."""
    core, store = engine._core, engine._store
    if core is None:
        raise SystemExit("the engine is closed")
    plain = PlainConfig(store.current)
    for index in range(batch):
        engine.add_request([1 + index, 2, 3], SamplingParams(max_new_tokens=3 * steps + NUM_WARM_UP + 1))
    for _ in range(NUM_WARM_UP):
        engine.step()
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(steps):
        for turn in range(len(SIDES)):
            side = SIDES[(number + turn) % len(SIDES)]
            count = NUM_SUBSCRIBERS if side == "store with subscribers" else 0
            ends = [engine.config.subscribe("*", lambda changes: None) for _ in range(count)]
            core._config = plain if side == "plain attribute" else store  # type: ignore[assignment]
            began = timeit.default_timer()
            engine.step()
            seconds[side].append(timeit.default_timer() - began)
            for end in ends:
                end()
    rounds = list(zip(*seconds.values(), strict=True))
    ratios = {side: statistics.median(times[i] / times[0] for times in rounds) for i, side in enumerate(SIDES)}
    return StepTimes({side: statistics.median(times) for side, times in seconds.items()}, ratios)


def time_reads(engine: InferenceEngine) -> dict[str, float]:
    """Seconds of one read of a limit, for each way of reading."""
    store, plain = engine._store, PlainConfig(engine._store.current)
    reads = {
        "plain attribute": lambda: plain.current.inference.scheduler.max_num_seqs,
        "store attribute": lambda: store.current.inference.scheduler.max_num_seqs,
        "config attribute": lambda: engine.config.inference.scheduler.max_num_seqs,
        "config path": lambda: engine.config.get("scheduler.max_num_seqs"),
    }
    return {name: min(timeit.repeat(read, number=NUM_READS, repeat=3)) / NUM_READS for name, read in reads.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="requests that decode together")
    parser.add_argument("--steps", type=int, default=600, help="steps of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args()
    torch.manual_seed(0)
    max_len = 3 * args.steps + 64
    shardformer, engine = make_engine(args.layers, args.hidden, threads=args.threads, batch=args.batch, max_len=max_len)
    with shardformer:
        steps = time_steps(engine, batch=args.batch, steps=args.steps)
        reads = time_reads(engine)
    if args.json:
        print(json.dumps({"step_s": steps.seconds, "ratio": steps.ratios, "read_s": reads}))
        return
    print(f"{args.steps} rounds, steps of {args.batch} requests, {args.threads} threads, torch {torch.__version__}")
    for side, median in steps.seconds.items():
        print(f"  {side:<24}{median * 1e3:9.4f} ms   ratio {steps.ratios[side]:.4f}")
    base = steps.seconds["plain attribute"]
    print("one read of max_num_seqs")
    for name, median in reads.items():
        print(f"  {name:<24}{median * 1e9:9.1f} ns   {median / base:.6%} of a step")


if __name__ == "__main__":
    main()
