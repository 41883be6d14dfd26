"""Rank program: scores sequences with weights or a cache in 8 bits and without, and tells what the weights take.

Usage: RANK=... int8_ranks.py CHECKPOINT SEQUENCES_JSON OUT_FOLDER [KIND...], kinds are kept, int8, fp8 and fp8_cache.
Rank 0 writes the logits to OUT_FOLDER/KIND.pt; every rank prints one line for each kind.
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
SETTINGS: dict[str, dict[str, object]] = {
    "kept": {"weights": {"compression": "none"}},
    "int8": {"weights": {"quantization": "int8"}},
    "fp8": {"weights": {"quantization": "fp8"}},
    "fp8_cache": {"weights": {"compression": "none"}, "cache": {"num_blocks": 128, "dtype": "fp8"}},
}


@dataclass(frozen=True)
class Scored:
    """What one rank found with one kind of weights."""

    tokens: list[list[list[int]]]  # of two runs, for each sequence
    planned: int  # bytes of weights that the plan of this rank says
    held: int  # bytes of the parameters that the rank holds
    worst_step: float  # the largest error of a weight, beyond the rounding to bf16, in steps; see `_worst_step`
    cache_bytes: int  # of one token


def score(folder: str | Path, sequences: list[list[int]], kind: str) -> tuple[Scored, torch.Tensor]:
    """Shard the checkpoint over the ranks there are, and run it in bf16."""
    settings = {"dtype": "bf16", "cache": {"num_blocks": 128}, **SETTINGS[kind]}
    with InferenceShardformer(ShardConfig(device="cpu"), InferenceConfig.model_validate(settings)) as shardformer:
        model = shardformer.from_pretrained(folder)
        engine = shardformer.attach(model)
        logits = engine_logits(shardformer, engine, sequences)
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        prompts = [sequence[:PROMPT_TOKENS] for sequence in sequences]
        runs = [[list(output.token_ids) for output in engine.generate(prompts, sampling)] for _ in range(2)]
        held = sum(parameter.nbytes for parameter in model.parameters())
        planned = shardformer.sharded.rank_bytes[shardformer.group.rank]
        parameters = shardformer.sharded.plan.parameters
        steps = [_worst_step(model, each, folder, is_fp8=kind == "fp8") for each in parameters]
        cache_bytes = engine.kv_cache.spec.bytes_per_token
    return Scored(runs, planned, held, max(steps), cache_bytes), logits


def _worst_step(model: nn.Module, parameter: ParameterPlan, folder: str | Path, *, is_fp8: bool) -> float:
    """Compare what a rank holds with its slice of a file.

    A step of int8 is a 127th of the largest value in the slice's row. One of e4m3 is an eighth of a value, and at least
    2^-9 of what the row's largest value, 448, stands for.
    """
    with safe_open(Path(folder, "model.safetensors"), framework="pt") as file:
        parts = [(part, file.get_tensor(part.tensor).float()) for part in parameter.slices]
    expected = torch.zeros(parameter.shape)
    for part, whole in parts:
        size = part.stop - part.start
        expected.narrow(part.dim, part.offset, size).copy_(whole.narrow(part.dim, part.start, size))
    error = (parameter_value(model, parameter.name).float() - expected).abs() - BF16_ROUNDING * expected.abs()
    if expected.dim() == 1:
        return 0.0 if error.max() <= 0 else float("inf")
    largest = expected.abs().amax(dim=1, keepdim=True)
    step = torch.maximum(expected.abs() / 8, largest / 448 * 2**-9) if is_fp8 else largest / 127
    return float((error / step.clamp_min(1e-12)).max())


def main(folder: str, sequences: list[list[int]], out: Path, kinds: list[str]) -> None:
    """Score every kind."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind in kinds or ["kept", "int8"]:
        scored, logits = score(folder, sequences, kind)
        if dist.get_rank() == 0:
            torch.save(logits, out / f"{kind}.pt")
        print(json.dumps(asdict(scored)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
