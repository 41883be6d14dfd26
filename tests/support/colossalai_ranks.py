"""Rank program: shards every tiny model through ColossalAI's ModelSharder and writes what rank 0 got.

Usage: torchrun --nproc-per-node N colossalai_ranks.py FOLDER OUT.json
FOLDER holds `work.json`: {case: {"prompts": [[ids]], "max_new_tokens": n}}. Models are made by `tiny_model`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from colossalai_policies import CASES_OF_POLICIES, COLOSSAL_INFERENCE
from tiny_models import tiny_model
from transformers import LlamaForCausalLM

from inference_shardformer import InferenceEngine, SamplingParams
from inference_shardformer.bridges.colossalai import ColossalInferenceShardformer
from inference_shardformer.bridges.colossalai.upstream import ShardConfig


def through_bridge(case: str, prompts: list[list[int]], max_new_tokens: int) -> dict[str, object]:
    """Tokens of every prompt and the logits after the first, through ColossalAI's ShardConfig and ModelSharder."""
    native = tiny_model(case)
    with torch.no_grad():
        expected = native(torch.tensor(prompts[:1])).logits[0, -1]
    with ColossalInferenceShardformer(ShardConfig(), COLOSSAL_INFERENCE) as shardformer:
        model, _ = shardformer.optimize(native)
        engine = shardformer.attach(model)
        logits = logits_after(engine, model, prompts[0], native.config.vocab_size)
        sampling = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
        tokens = [list(output.token_ids) for output in engine.generate(prompts, sampling)]
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        explained = "tp_size" in str(shardformer.explain())
    return {"tokens": tokens, "off": (logits - expected).abs().max().item(), "tied": tied, "explained": explained}


def logits_after(engine: InferenceEngine, model: LlamaForCausalLM, prompt: list[int], vocab_size: int) -> torch.Tensor:
    """The logits of the whole vocabulary after a prompt, gathered from the output heads of all ranks."""
    heads: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: heads.append(output.detach().clone()))
    engine.generate([prompt], SamplingParams(max_new_tokens=1, ignore_eos=True))
    hook.remove()
    mine = heads[-1].reshape(-1, heads[-1].shape[-1])[-1].contiguous()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts)[:vocab_size]


def main(folder: Path, out: Path) -> None:
    """Run every case and every policy, and write the results on rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    work = json.loads((folder / "work.json").read_text())
    results: dict[str, object] = {
        case: through_bridge(case, each["prompts"], each["max_new_tokens"]) for case, each in work["cases"].items()
    }
    for name, run in CASES_OF_POLICIES.items():
        results[name] = run(**work["policies"])
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
