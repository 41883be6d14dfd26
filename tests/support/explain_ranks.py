"""Ranks of an explanation test: load, attach, explain; then a configuration that is wrong in several ways."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from inference_shardformer import ConfigSources, InferenceShardformer
from inference_shardformer.config.violations import ConfigViolations


def main(folder: str, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sources = ConfigSources(files=(file,), sets=("cache.block_size=8", "cache.num_blocks=70"), environ={})
    with InferenceShardformer(sources=sources) as shardformer:
        model = shardformer.from_pretrained(folder)
        sharded = shardformer.explain().to_json()
        shardformer.attach(model)
        attached = shardformer.explain().to_json()
        held = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
        threads = torch.get_num_threads()
    print(json.dumps({"sharded": sharded, "attached": attached, "held": held, "threads": threads}), flush=True)

    wrong = ConfigSources(
        files=(file,), sets=("max_model_len=999", "cache.blok_size=1", "sampling.top_k=3"), environ={}
    )
    with InferenceShardformer(sources=wrong) as shardformer:
        try:
            shardformer.from_pretrained(folder)
        except ConfigViolations as exc:
            print(json.dumps({"text": str(exc), "paths": [item.path for item in exc.violations]}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
