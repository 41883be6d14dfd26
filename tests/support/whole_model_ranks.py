"""Rank program: models in one native call on every rank, and while one rank alone watches a module; says what it saw.

Usage: whole_model_ranks.py PROMPTS.json, with [[ids], ...]; one line of JSON per rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import tiny_model

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.modeling.packed_forward import PackedForward

CASES = ("gqa", "odd_vocabulary", "odd_vocabulary_tied")
INFERENCE = {"dtype": "fp32", "cache": {"block_size": 4}, "scheduler": {"max_num_batched_tokens": 40}}


class Steps:
    """Counts the steps that ran module by module."""

    def __init__(self) -> None:
        self.num_by_modules = 0
        self._run = PackedForward._by_modules
        PackedForward._by_modules = lambda forward, *inputs: self._counted(forward, *inputs)

    def _counted(self, forward: PackedForward, *inputs: object) -> torch.Tensor:
        self.num_by_modules += 1
        return self._run(forward, *inputs)


def main(prompts: list[list[int]]) -> None:
    """Generate with every case, without a hook and with one on rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    steps, greedy, said = Steps(), SamplingParams(max_new_tokens=5, ignore_eos=True), {}
    for case in CASES:
        with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig.model_validate(INFERENCE)) as shardformer:
            model, _ = shardformer.optimize(tiny_model(case))
            engine = shardformer.attach(model)
            runs = []
            for is_watched in (False, True):
                if is_watched and dist.get_rank() == 0:
                    model.model.norm.register_forward_hook(lambda *_: None)
                steps.num_by_modules = 0
                tokens = [list(output.token_ids) for output in engine.generate(prompts, greedy)]
                runs.append({"tokens": tokens, "by_modules": steps.num_by_modules > 0})
            said[case] = runs
    print(json.dumps(said), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
