"""Rank program: loads every checkpoint by its plan file and says what this rank holds, exchanges and generates.

Usage: plan_ranks.py FOLDER PROMPTS
FOLDER holds one checkpoint folder per case, each with `plan.json`. PROMPTS is a JSON list of token ids. The first
line has every case, the last one what became of the plan `other.json`, which is for another number of ranks: on all
ranks, and on all but rank 0.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from inference_shardformer import ConfigSources, InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.errors import InferenceShardformerError

NOTHING = ConfigSources(environ={})
SHARD = ShardConfig(device="cpu", all_reduce="gloo")  # native code that sums inside passes no meter
CONFIG = InferenceConfig.model_validate(
    {
        "dtype": "fp32",
        "cache": {"block_size": 4, "num_blocks": 64, "prefix_caching": "off"},  # every prompt is computed, and counted
        "attention": {"backend": "reference"},
    }
)


class Meter:
    """Counts the bytes of every tensor that a group's collectives are called with."""

    def __init__(self, group: TensorParallelGroup) -> None:
        self.num_bytes: Counter[str] = Counter()
        self._run = group._run
        group._run = self._counting

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        taken, self.num_bytes = dict(self.num_bytes), Counter()
        return taken

    def _counting(self, collective, *arguments):
        name = {"gather": "all_gather", "broadcast": "broadcast"}.get(getattr(collective, "__name__", ""), "all_reduce")
        self.num_bytes[name] += arguments[0].nbytes
        return self._run(collective, *arguments)


def held_bytes(tensors) -> int:
    """Bytes of tensors, those that share memory once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def run(folder: Path, prompts: list[list[int]]) -> dict[str, object]:
    """Load one case by its plan, generate, and measure every step."""
    with InferenceShardformer(SHARD, CONFIG, sources=NOTHING) as shardformer:
        model = shardformer.from_pretrained(folder, plan=folder / "plan.json")
        engine = shardformer.attach(model)
        cache = engine.kv_cache
        layers = [cache.layer(index) for index in range(cache.spec.num_layers)]
        kv_bytes = held_bytes(tensor for layer in layers for tensor in layer)
        sizes: list[tuple[int, int]] = []
        model.register_forward_pre_hook(
            lambda _, args, given: sizes.append((given["input_ids"].numel(), given["logits_to_keep"].numel())),
            with_kwargs=True,
        )
        meter = Meter(shardformer.group)
        for prompt in prompts:
            engine.add_request(prompt, SamplingParams(max_new_tokens=5, ignore_eos=True))
        steps, outputs = [], {}
        while engine.has_unfinished():
            sizes.clear()
            finished = engine.step()
            outputs |= {output.request_id: list(output.token_ids) for output in finished}
            ((num_tokens, num_rows),) = sizes
            steps.append({"tokens": num_tokens, "rows": num_rows, "bytes": meter.take()})
        engine.generate(prompts[:1], SamplingParams(max_new_tokens=1, temperature=1.0, seed=3, ignore_eos=True))
        return {
            "held": held_bytes(model.parameters()),
            "kv_cache": kv_bytes,
            "num_blocks": cache.num_blocks,
            "steps": steps,
            "drawn": meter.take(),
            "outputs": list(outputs.values()),
        }


def refusal(folder: Path, plan: Path) -> dict[str, str]:
    """What is raised for a plan that does not fit."""
    with InferenceShardformer(SHARD, CONFIG, sources=NOTHING) as shardformer:
        try:
            shardformer.from_pretrained(folder, plan=plan)
        except InferenceShardformerError as exc:
            return {"error": type(exc).__name__, "message": exc.message}
    return {}


def main(folder: Path, prompts: list[list[int]]) -> None:
    """Every case, then a plan that is for other ranks, and one that only rank 0 has."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = sorted(path.parent for path in folder.glob("*/plan.json"))
    print(json.dumps({case.name: run(case, prompts) for case in cases}), flush=True)
    mine = cases[0] / "plan.json" if dist.get_rank() == 0 else folder / "other.json"
    print(json.dumps([refusal(cases[0], folder / "other.json"), refusal(cases[0], mine)]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
