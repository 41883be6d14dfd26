"""Generated tokens per second beside Hugging Face `generate` (static batch) and its continuous batching.

All sides hold the same random weights of a 135M-parameter LLaMA shape and serve the same ragged requests; they take
turns in one run, and medians and ratios are printed. Greedy, end of sequence ignored.

    python scripts/benchmark_generate.py --dtype bf16 --threads 2 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPE_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Workload:
    """Ragged requests: token ids, and how many tokens each must generate."""

    prompts: list[list[int]]
    max_new_tokens: list[int]

    @property
    def generated(self) -> int:
        """Tokens that every side must generate."""
        return sum(self.max_new_tokens)


Side = Callable[[Workload], float]


def ragged_workload(count: int, *, vocab_size: int, seed: int) -> Workload:
    """`count` requests with prompts of 8 to 256 tokens and 8 to 64 tokens to generate, all lengths log-uniform."""
    generator = torch.Generator().manual_seed(seed)
    prompts, lengths = [], []
    for draw in torch.rand((count, 2), generator=generator).tolist():
        length = round(8 * (256 / 8) ** draw[0])
        prompts.append(torch.randint(0, vocab_size, (length,), generator=generator).tolist())
        lengths.append(round(8 * (64 / 8) ** draw[1]))
    return Workload(prompts, lengths)


def ours(folder: Path, dtype: str, threads: int, count: int) -> Side:
    """Our engine over the checkpoint, one rank."""
    inference = InferenceConfig.model_validate({"dtype": dtype, "scheduler": {"max_num_seqs": count}})
    shardformer = InferenceShardformer(ShardConfig(device="cpu", threads_per_rank=threads), inference)
    engine = shardformer.attach(shardformer.from_pretrained(folder))

    def run(work: Workload) -> float:
        sampling = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in work.max_new_tokens]
        start = time.perf_counter()
        outputs = engine.generate(work.prompts, sampling)
        seconds = time.perf_counter() - start
        _check(sum(len(output.token_ids) for output in outputs), work)
        return seconds

    return run


def hugging_face_static(model: LlamaForCausalLM) -> Side:
    """`generate` over one left-padded batch, as long as its longest request; only asked-for tokens count."""

    def run(work: Workload) -> float:
        width = max(map(len, work.prompts))
        ids = torch.zeros((len(work.prompts), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(work.prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=max(work.max_new_tokens), pad_token_id=0
        )
        return time.perf_counter() - start

    return run


def hugging_face_continuous(model: LlamaForCausalLM, count: int) -> Side:
    """Hugging Face's paged continuous batching, every request with its own length."""
    config = ContinuousBatchingConfig(page_size=32, num_blocks=count * 16, max_batch_tokens=2048)
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=64)

    def run(work: Workload) -> float:
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config
        ) as manager:
            start = time.perf_counter()
            for index, (prompt, length) in enumerate(zip(work.prompts, work.max_new_tokens, strict=True)):
                manager.add_request(prompt, request_id=str(index), max_new_tokens=length)
            results: dict[str, int] = {}
            while len(results) < len(work.prompts):
                result = manager.get_result(timeout=60)
                if result is not None and result.is_finished():
                    results[result.request_id] = len(result.generated_tokens)
            seconds = time.perf_counter() - start
        _check(sum(results.values()), work)
        return seconds

    return run


def _check(generated: int, work: Workload) -> None:
    if generated != work.generated:
        raise RuntimeError(
            f"a side generated {generated} tokens instead of {work.generated}: the times are not comparable"
        )


def compare(sides: dict[str, Side], work: Workload, warm_up: Workload, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of every side, the sides taking turns in each round."""
    for side in sides.values():
        side(warm_up)
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            speeds[name].append(work.generated / side(work))
            print(f"round {number + 1}: {name:28} {speeds[name][-1]:8.1f} tokens/s", flush=True)
    return speeds


def report(dtype: str, speeds: dict[str, list[float]]) -> None:
    """Medians, and the median of the round-by-round ratios of our side to each other one."""
    mine = speeds["inference-shardformer"]
    print(f"\n{dtype}: median generated tokens per second, and how many times faster we are (median of rounds)")
    for name, values in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(mine, values, strict=True))
        print(f"  {name:28} {statistics.median(values):8.1f}   x {ratio:.2f}")
    print(json.dumps({"dtype": dtype, "tokens_per_second": speeds}))


def main() -> None:
    """Run the comparison for each asked type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--no-continuous", action="store_true", help="leave Hugging Face's continuous batching out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for dtype in args.dtype or list(DTYPES):
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**SHAPE_135M)).to(DTYPES[dtype]).save_pretrained(folder)
            model = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation="sdpa").eval()
            sides: dict[str, Side] = {
                "inference-shardformer": ours(Path(folder), dtype, args.threads, args.requests),
                "hf generate, static batch": hugging_face_static(model),
            }
            if not args.no_continuous:
                sides["hf continuous batching"] = hugging_face_continuous(model, args.requests)
            vocab_size = SHAPE_135M["vocab_size"]
            work = ragged_workload(args.requests, vocab_size=vocab_size, seed=1)
            warm_up = ragged_workload(4, vocab_size=vocab_size, seed=2)
            report(dtype, compare(sides, work, warm_up, args.rounds))


if __name__ == "__main__":
    main()
