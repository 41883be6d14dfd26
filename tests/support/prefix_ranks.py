"""Rank program: requests that begin alike, over every change that a prefix cache must survive; says what it saw.

Usage: prefix_ranks.py WORK.json, with {"prompts": [[ids], ...], "turns": [[ids], ...]}; one line of JSON per rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import tiny_model

from inference_shardformer import InferenceConfig, InferenceEngine, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.config.sources import ConfigSources

GREEDY = SamplingParams(max_new_tokens=14, ignore_eos=True)


def settings(num_blocks: int, *, tokens: int = 24, caching: str = "on") -> InferenceConfig:
    """A small cache, and steps that cut prompts."""
    return InferenceConfig.model_validate(
        {
            "dtype": "fp32",
            "cache": {"block_size": 4, "num_blocks": num_blocks, "prefix_caching": caching},
            "scheduler": {"max_num_seqs": 6, "max_num_batched_tokens": tokens},
        }
    )


def run(engine: InferenceEngine, prompts: list[list[int]]) -> dict[str, object]:
    """Tokens, how many were found, and how often a request lost its blocks."""
    outputs = engine.generate(prompts, GREEDY)
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "found": sum(output.usage.num_cached_tokens for output in outputs),
        "preempted": sum(output.usage.num_preemptions for output in outputs),
        "recomputed": sum(output.usage.num_recomputed_tokens for output in outputs),
    }


def main(work: dict[str, list[list[int]]]) -> dict[str, object]:
    """What this rank saw in each phase."""
    said: dict[str, object] = {}
    prompts, turns = work["prompts"], work["turns"]
    for name, config in {"roomy": settings(200), "tight": settings(24), "off": settings(24, caching="off")}.items():
        with InferenceShardformer(ShardConfig(device="cpu"), config, sources=ConfigSources(environ={})) as shardformer:
            engine = shardformer.attach(shardformer.optimize(tiny_model("gqa"))[0])
            said[name] = [run(engine, prompts), run(engine, prompts)]
            if name != "roomy":
                continue
            said["turns"] = run(engine, turns)
            if dist.get_rank() == 0:
                engine.reset_prefix_cache()
            said["reset"] = run(engine, prompts[:1])
            engine.switch_backend("reference")
            said["switched"] = [run(engine, prompts), run(engine, prompts)]
            engine.update_weights(tiny_model("gqa", seed=7).state_dict())
            said["new weights"] = [run(engine, prompts), run(engine, prompts)]
            said["stats"] = repr(engine.prefix_cache_stats)
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))), flush=True)
    dist.destroy_process_group()
