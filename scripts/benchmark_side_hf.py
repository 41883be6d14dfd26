"""A side of a benchmark: Hugging Face `generate` or its continuous batching. See `benchmarking.sides`."""

from __future__ import annotations

import argparse
import time

import torch
from benchmarking.hugging_face import run_continuous
from benchmarking.serving import Serve, serve
from benchmarking.workloads import Workload
from transformers import LlamaForCausalLM


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
    """Hugging Face's paged continuous batching."""
    return lambda work: run_continuous(model, work, num_blocks=512)


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
