"""Rank program: loads one checkpoint and writes what this rank read, held and needed at its peak.

Usage: torchrun --nproc-per-node N load_ranks.py SMALL_CHECKPOINT CHECKPOINT OUT_FOLDER COMPRESSION
The small checkpoint is loaded first, so that imports do not count.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from inference_shardformer import InferenceConfig, InferenceShardformer, ShardConfig


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main(small: Path, checkpoint: Path, out: Path, compression: str) -> None:
    """Load both; report the second."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    inference = InferenceConfig.model_validate({"dtype": "bf16", "weights": {"compression": compression}})
    with InferenceShardformer(ShardConfig(device="cpu"), inference) as shardformer:
        shardformer.from_pretrained(small)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = peak_rss()
    with InferenceShardformer(ShardConfig(device="cpu"), inference) as shardformer:
        shardformer.from_pretrained(checkpoint)
        peak = peak_rss() - before
        sharded = shardformer.sharded
        held = sum(parameter.nbytes for parameter in sharded.model.parameters())
        planned = sharded.rank_bytes[dist.get_rank()]
        report = {"planned": planned, "held": held, "read": sharded.bytes_read, "peak": peak}
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4])
