"""What simulated ranks must do to the last bit as real ones do. Run by torchrun it writes `{rank: digests}` as JSON.

Usage: torchrun --nproc-per-node N simulated_parity_ranks.py FOLDER
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from inference_shardformer import InferenceConfig, InferenceShardformer, SamplingParams, ShardConfig
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup

RUNS = (("gloo", "fp32"), ("gloo", "bf16"), ("shm", "bf16"))  # all-reduce and type
SUMS = [
    (torch.float32, 5),
    (torch.float32, 4099),
    (torch.bfloat16, 1031),
    (torch.float16, 64),
    (torch.float32, 600_001),
]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [31, 41, 59, 26, 53]]


def configs(all_reduce: str, dtype: str) -> tuple[ShardConfig, InferenceConfig]:
    """A small cache, and layers module by module: a fused layer may round differently."""
    inference = {"dtype": dtype, "cache": {"block_size": 4, "num_blocks": 40}, "kernels": {"decoder_layer": "modules"}}
    shard = ShardConfig(device="cpu", threads_per_rank=1, all_reduce=all_reduce)
    return shard, InferenceConfig.model_validate(inference)


def sums(group: TensorParallelGroup) -> list[str]:
    """Digests of sums whose last bits depend on the order of the ranks."""
    digests = []
    for dtype, size in SUMS:
        part = torch.randn(size, generator=torch.Generator().manual_seed(size + group.rank)).to(dtype)
        digests.append(digest(group.all_reduce(part)))
    return digests


def logits(shardformer: InferenceShardformer, folder: Path) -> list[str]:
    """Digests of this rank's logits in every step of a short generation."""
    seen: list[str] = []
    model = shardformer.from_pretrained(folder)
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(digest(output)))
    engine = shardformer.attach(model)
    engine.generate(PROMPTS, SamplingParams(max_new_tokens=5, ignore_eos=True))
    return seen


def digest(t: torch.Tensor) -> str:
    """Equal for tensors that are equal in every bit."""
    return hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def main(folder: Path) -> None:
    """Run on real ranks and print this rank's digests."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = TensorParallelGroup.from_process_group(
        dist.group.WORLD, device=torch.device("cpu"), timeout_s=60.0, all_reduce="gloo"
    )
    found = {"sums": sums(group)}
    for run in RUNS:
        with InferenceShardformer(*configs(*run)) as shardformer:
            found[" ".join(run)] = logits(shardformer, folder)
    print(json.dumps(found))
    group.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
