"""A rank of gpu_check.py, which starts it: generates greedily; rank 0 prints the tokens and what was decided."""

from __future__ import annotations

import json
import sys

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.config.sources import ConfigSources

SHOWN = ("shard.all_reduce", "inference.attention.backend", "inference.graphs", "inference.scheduler.overlap")


def main(task: dict) -> None:
    """Load the model of the task, over all ranks, and generate."""
    shardformer = InferenceShardformer(
        ShardConfig(**task["shard"]),
        InferenceConfig.model_validate(task["inference"]),
        sources=ConfigSources(environ={}),
    )
    model = shardformer.from_pretrained(task["folder"])
    engine = shardformer.attach(model)
    params = SamplingParams(max_new_tokens=task["new_tokens"], ignore_eos=True)
    outputs = engine.generate(task["prompts"], params)
    said = {
        "token_ids": [list(output.token_ids) for output in outputs],
        "served": ", ".join(f"{path} {engine.config[path]}" for path in SHOWN),
    }
    shardformer.close()
    if task["rank"] == 0:
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
