"""Rank program: scores sequences with 8-bit weights and without, and tells what the weights take.

Usage: RANK=... int8_ranks.py CHECKPOINT SEQUENCES_JSON OUT_FOLDER
Rank 0 writes the logits to OUT_FOLDER; every rank prints one line for each kind of weights.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from scoring import engine_logits
from torch import nn

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.sharding.plan import ParameterPlan
from inference_shardformer.sharding.storage import parameter_value

PROMPT_TOKENS, NEW_TOKENS = 24, 24
BF16_ROUNDING = 2**-8


@dataclass(frozen=True)
class Scored:
    """What one rank found with one kind of weights."""

    tokens: list[list[list[int]]]  # of two runs, for each sequence
    planned: int  # bytes of weights that the plan of this rank says
    held: int  # bytes of the parameters that the rank holds
    worst_step: float  # the largest error of a weight, beyond the rounding to bf16, in steps of its row on this rank


def score(folder: str | Path, sequences: list[list[int]], quantization: str | None) -> tuple[Scored, torch.Tensor]:
    """Shard the checkpoint over the ranks there are, and run it in bf16."""
    inference = InferenceConfig.model_validate(
        {"dtype": "bf16", "weights": {"quantization": quantization}, "cache": {"num_blocks": 128}}
    )
    with InferenceShardformer(ShardConfig(device="cpu"), inference) as shardformer:
        model = shardformer.from_pretrained(folder)
        engine = shardformer.attach(model)
        logits = engine_logits(shardformer, engine, sequences)
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        prompts = [sequence[:PROMPT_TOKENS] for sequence in sequences]
        runs = [[list(output.token_ids) for output in engine.generate(prompts, sampling)] for _ in range(2)]
        held = sum(parameter.nbytes for parameter in model.parameters())
        planned = shardformer.sharded.rank_bytes[shardformer.group.rank]
        steps = [_worst_step(model, each, folder) for each in shardformer.sharded.plan.parameters]
    return Scored(runs, planned, held, max(steps)), logits


def _worst_step(model: nn.Module, parameter: ParameterPlan, folder: str | Path) -> float:
    """Compare what a rank holds with its slice of a file; a step is a 127th of the largest value in the slice's row."""
    with safe_open(Path(folder, "model.safetensors"), framework="pt") as file:
        parts = [(part, file.get_tensor(part.tensor).float()) for part in parameter.slices]
    expected = torch.zeros(parameter.shape)
    for part, whole in parts:
        size = part.stop - part.start
        expected.narrow(part.dim, part.offset, size).copy_(whole.narrow(part.dim, part.start, size))
    error = (parameter_value(model, parameter.name).float() - expected).abs() - BF16_ROUNDING * expected.abs()
    if expected.dim() == 1:
        return 0.0 if error.max() <= 0 else float("inf")
    step = expected.abs().amax(dim=1, keepdim=True) / 127
    return float((error / step.clamp_min(1e-12)).max())


def main(folder: str, sequences: list[list[int]], out: Path) -> None:
    """Score both kinds of weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for quantization in (None, "int8"):
        scored, logits = score(folder, sequences, quantization)
        if dist.get_rank() == 0:
            torch.save(logits, out / f"{quantization}.pt")
        print(json.dumps(asdict(scored)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))
