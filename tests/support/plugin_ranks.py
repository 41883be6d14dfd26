"""Ranks with different plug-ins installed: each case selects a backend together, and prints what was raised."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from inference_shardformer.attention.base import AttentionSpec
from inference_shardformer.attention.selector import Selection, select
from inference_shardformer.attention.survey import make_registry, make_survey
from inference_shardformer.distributed.guard import RankGuard
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.errors import InferenceShardformerError

RANK = int(os.environ["RANK"])
CPU = torch.device("cpu")
SPEC = AttentionSpec(2, 1, 8, 0.35, torch.float32, CPU, 16)


def install(folder: Path, source: str) -> None:
    """A plug-in of one module, on this rank alone."""
    (folder / "uneven-1.2.dist-info").mkdir(parents=True)
    (folder / "uneven-1.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: uneven\nVersion: 1.2\n")
    entry = "[inference_shardformer.attention_backends]\nplugged = uneven:Backend\n"
    (folder / "uneven-1.2.dist-info" / "entry_points.txt").write_text(entry)
    (folder / "uneven.py").write_text(source)
    sys.path.insert(0, str(folder))


def choose(requested: str) -> Any:
    """Select as preparation does: in a phase of all ranks, then compare the candidates."""
    group = TensorParallelGroup.from_process_group(dist.group.WORLD, device=CPU, timeout_s=30)
    guard = RankGuard(group, timeout_s=30)

    def selecting() -> Selection:
        return select(SPEC, requested, make_survey(CPU, make_registry()))

    try:
        selection = guard.together("preparation", selecting)
        guard.agree("preparation", {"attention backends": selection.candidates()})
    except InferenceShardformerError as exc:
        return {"type": type(exc).__name__, "message": exc.message}
    finally:
        guard.close()
    return {"chosen": selection.name}


def main() -> None:
    """`broken FOLDER`: rank 1's plug-in cannot be imported. `absent FOLDER`: only rank 0 has one."""
    kind, folder = sys.argv[1:]
    good = "from inference_shardformer.attention.reference import ReferenceAttention as Backend\n"
    if RANK == 0:
        install(Path(folder) / "rank0", good)
    elif kind == "broken":
        install(Path(folder) / "rank1", "raise ImportError('uneven.so: undefined symbol: _ZN3c10')\n")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    print(json.dumps({"auto": choose("auto"), "named": choose("plugged")}), flush=True)


if __name__ == "__main__":
    main()
