"""Rank program for four ranks: engines on two disjoint sub-groups, then one on the world, in the caller's own groups.

Usage: RANK=... subgroup_ranks.py CHECKPOINT PROMPTS_JSON
Each rank prints one JSON line: the tokens of the engine on its half, of the engine on the world, and what became of the
caller's groups.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig


def main(checkpoint: str, prompts: list[list[int]]) -> None:
    """Generate on the half and on the world, alternately."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = halves[rank // 2]
    inference = InferenceConfig.model_validate({"dtype": "fp32", "cache": {"num_blocks": 64}})
    sampling = SamplingParams(max_new_tokens=8)
    with (
        InferenceShardformer(ShardConfig(tp_size=2, device="cpu"), inference, process_group=mine) as half,
        InferenceShardformer(ShardConfig(tp_size=4, device="cpu"), inference) as world,
    ):
        on_half = half.attach(half.from_pretrained(checkpoint))
        on_world = world.attach(world.from_pretrained(checkpoint))
        tokens = {"half": [], "world": []}
        for prompt in prompts:
            tokens["half"].append(list(on_half.generate([prompt], sampling)[0].token_ids))
            tokens["world"].append(list(on_world.generate([prompt], sampling)[0].token_ids))
    total = torch.ones(1)
    dist.all_reduce(total, group=mine)
    dist.all_reduce(total)
    print(json.dumps({**tokens, "callers_groups_still_work": total.item() == 8.0}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
