"""A side of a benchmark: Hugging Face `generate` or its continuous batching. See `benchmarking.sides`."""

from __future__ import annotations

import argparse
import time

import torch
from benchmarking.serving import Serve, serve
from benchmarking.workloads import Workload
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM


def static(model: LlamaForCausalLM) -> Serve:
    """`generate` over one left-padded batch, as long as its longest request; only asked-for tokens count."""

    def run(work: Workload) -> tuple[float, int]:
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
        return time.perf_counter() - start, work.generated

    return run


def continuous(model: LlamaForCausalLM) -> Serve:
    """Hugging Face's paged continuous batching, every request with its own length."""
    config = ContinuousBatchingConfig(page_size=32, num_blocks=512, max_batch_tokens=2048)
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=64)

    def run(work: Workload) -> tuple[float, int]:
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
            return time.perf_counter() - start, sum(results.values())

    return run


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--mode", choices=("static", "continuous"), default="static")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(args.folder, dtype="auto", attn_implementation="sdpa").eval()
    serve(static(model) if args.mode == "static" else continuous(model))


if __name__ == "__main__":
    main()
