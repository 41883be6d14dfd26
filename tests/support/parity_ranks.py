"""Rank program: generates with every tiny model, through both ways of sharding, and writes the tokens of rank 0.

One way decodes token by token, the other verifies guesses.

Usage: torchrun --nproc-per-node N parity_ranks.py FOLDER OUT.json
FOLDER holds one checkpoint folder per case and `prompts.json`: {case: {"prompts": [[ids]], "max_new_tokens": n}}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig

CACHE = {"block_size": 4, "num_blocks": 40}  # 160 tokens: too small for all requests at once
SCHEDULER = {"max_num_seqs": 16, "max_num_batched_tokens": 48}


def generate(route: str, folder: Path, prompts: list[list[int]], max_new_tokens: int) -> dict[str, object]:
    """Tokens of every prompt through one way of sharding, and how many of them were guessed."""
    scheduler = {**SCHEDULER, "speculation": "prompt_lookup" if route == "optimize" else "off"}
    inference = InferenceConfig.model_validate({"dtype": "fp32", "cache": CACHE, "scheduler": scheduler})
    with InferenceShardformer(ShardConfig(device="cpu"), inference) as shardformer:
        if route == "from_pretrained":
            model = shardformer.from_pretrained(folder)
        else:
            model, _ = shardformer.optimize(LlamaForCausalLM.from_pretrained(folder))
        engine = shardformer.attach(model)
        sampling = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
        outputs = engine.generate(prompts, sampling)
        num_guessed = sum(output.usage.num_accepted_draft_tokens for output in outputs)
        return {"tokens": [list(output.token_ids) for output in outputs], "num_guessed": num_guessed}


def main(folder: Path, out: Path) -> None:
    """Run every case and write `{case: {route: {"tokens", "num_guessed"}}}` on rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = json.loads((folder / "prompts.json").read_text())
    results = {
        case: {
            route: generate(route, folder / case, work["prompts"], work["max_new_tokens"])
            for route in ("from_pretrained", "optimize")
        }
        for case, work in cases.items()
    }
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
