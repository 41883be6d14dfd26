"""Rank program: two shardformers one after the other, each joining the ranks of the launcher by itself.

Usage: torchrun --nproc-per-node N again_ranks.py CHECKPOINT
Rank 0 prints one JSON line with the tokens of both.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig


def main(checkpoint: str) -> None:
    """Generate, close, and do it again."""
    torch.set_num_threads(1)
    tokens = []
    for _ in range(2):
        with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig(dtype="fp32")) as shardformer:
            engine = shardformer.attach(shardformer.from_pretrained(checkpoint))
            tokens.append(list(engine.generate([[3, 1, 4]], SamplingParams(max_new_tokens=6))[0].token_ids))
            is_main = shardformer.group.rank == 0
    if is_main:
        print(json.dumps({"tokens": tokens, "left_behind": dist.is_initialized()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
