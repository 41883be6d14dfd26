"""Rank program: generates with log-probabilities, with much room and with little, and writes those of rank 0.

Usage: torchrun --nproc-per-node N logprob_ranks.py FOLDER OUT.json
FOLDER holds a checkpoint and `requests.json`: {"prompts": [[ids]], "params": [{...}]}. OUT.json has
{"roomy" | "tight": [{"token_ids", "logprobs", "prompt_logprobs", ...}]}. Ranks with other outputs than rank 0 fail.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.engine.logprobs import TokenLogprobs

LIMITS: dict[str, dict[str, dict[str, int]]] = {
    "roomy": {"cache": {"block_size": 4, "num_blocks": 200}},
    "tight": {
        "cache": {"block_size": 4, "num_blocks": 13},
        "scheduler": {"max_num_seqs": 6, "max_num_batched_tokens": 13},
    },
}


def generate(folder: Path, limits: dict[str, dict[str, int]]) -> list[dict[str, object]]:
    """What each request got."""
    requests = json.loads((folder / "requests.json").read_text())
    inference = InferenceConfig.model_validate({"dtype": "fp32", **limits})
    with InferenceShardformer(ShardConfig(device="cpu"), inference) as shardformer:
        engine = shardformer.attach(shardformer.from_pretrained(folder))
        outputs = engine.generate(requests["prompts"], [SamplingParams(**each) for each in requests["params"]])
    return [
        {
            "token_ids": output.token_ids,
            "logprobs": None if output.logprobs is None else list(map(_plain, output.logprobs)),
            "prompt_logprobs": None if output.prompt_logprobs is None else list(map(_plain, output.prompt_logprobs)),
            "num_preemptions": output.usage.num_preemptions,
        }
        for output in outputs
    ]


def _plain(logprobs: TokenLogprobs | None) -> dict[str, object] | None:
    return None if logprobs is None else asdict(logprobs)


def main(folder: Path, out: Path) -> None:
    """Run with all limits; rank 0 writes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = json.dumps({name: generate(folder, limits) for name, limits in LIMITS.items()})
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    if dist.get_rank() == 0:
        out.write_text(results)
    dist.destroy_process_group()
    if results != everyone[0]:
        raise SystemExit("this rank has other outputs than rank 0")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
