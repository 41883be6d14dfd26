"""Two ranks, of which one waits for a device that never ends while the other fails; prints what the first raises."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from guard_ranks import attempt

from inference_shardformer.distributed.environment import ensure_process_group
from inference_shardformer.distributed.guard import RankGuard
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.engine.staging import OnItsWay

CPU = torch.device("cpu")


def wait_for(fault: str) -> Any:
    """Rank 0 waits for its device as a step does, in a kernel that waits for rank 1."""
    group = TensorParallelGroup.from_process_group(dist.group.WORLD, device=CPU, timeout_s=20)
    guard = RankGuard(group, timeout_s=20)

    def step() -> None:
        with guard.step("decode"):
            if group.rank == 0:
                way = OnItsWay(torch.tensor([1]), lambda: group.is_closed)
                way._is_here = SimpleNamespace(query=lambda: False)
                way.wait()
            elif fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise ValueError("broken on purpose")

    said = attempt(step)
    guard.close()
    return said


if __name__ == "__main__":
    ensure_process_group(CPU, 20.0)
    print(json.dumps({fault: wait_for(fault) for fault in ("raise", "kill")}))
