"""Rank program: verifies a checkpoint on real ranks, with a sound and with a broken policy; prints both reports.

Usage: torchrun --nproc-per-node N verify_ranks.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from mutations import MUTATIONS

from inference_shardformer import verify_sharding
from inference_shardformer.policies.llama import LlamaPolicy


def main(folder: Path) -> None:
    """Verify twice on the default group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    broken = MUTATIONS["no all-reduce in down_proj"].inject(LlamaPolicy())
    for policy in (LlamaPolicy(), broken):
        report = verify_sharding(folder, tp_size=dist.get_world_size(), policy=policy, ranks="real")
        print(json.dumps(report.to_json()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
