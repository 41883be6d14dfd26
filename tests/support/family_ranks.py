"""Rank program: generates with every family, through the given ways of sharding, and writes the tokens of rank 0.

Usage: torchrun --nproc-per-node N family_ranks.py FOLDER OUT.json ROUTE...
FOLDER holds one checkpoint folder per case and `prompts.json`: {case: {"prompts": [[ids]], "max_new_tokens": n}}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import baichuan_like
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig

# 160 tokens in blocks of two sizes: too small for all requests at once
CACHE = {
    "from_pretrained": {"block_size": 4, "num_blocks": 40},
    "optimize": {"block_size": 8, "num_blocks": 20},
}
SCHEDULER = {"max_num_seqs": 16, "max_num_batched_tokens": 24}  # prompts are longer: they come in pieces


def generate(route: str, folder: Path, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Tokens of every prompt through one way of sharding."""
    inference = InferenceConfig.model_validate({"dtype": "fp32", "cache": CACHE[route], "scheduler": SCHEDULER})
    with InferenceShardformer(ShardConfig(device="cpu"), inference) as shardformer:
        if route == "from_pretrained":
            model = shardformer.from_pretrained(folder)
        else:
            model, _ = shardformer.optimize(AutoModelForCausalLM.from_pretrained(folder))
        engine = shardformer.attach(model)
        sampling = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
        return [list(output.token_ids) for output in engine.generate(prompts, sampling)]


def main(folder: Path, out: Path, routes: list[str]) -> None:
    """Run every case and write `{case: {route: tokens}}` on rank 0."""
    torch.set_num_threads(1)
    baichuan_like.register()
    dist.init_process_group("gloo")
    cases = json.loads((folder / "prompts.json").read_text())
    results = {
        case: {route: generate(route, folder / case, work["prompts"], work["max_new_tokens"]) for route in routes}
        for case, work in cases.items()
    }
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
