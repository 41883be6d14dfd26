"""Two ranks whose device is the same CUDA device, as far as they know: prints what gloo gives and NCCL's refusal."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from group_ranks import check_group

from inference_shardformer.distributed.devices import Seat
from inference_shardformer.distributed.environment import ensure_process_group
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.errors import EnvironmentMismatchError

DEVICE = torch.device("cuda", 0)


def main() -> None:
    """Tensors stay on the CPU here; which collectives run, and over what, is the same."""
    ensure_process_group(DEVICE, 20.0, with_nccl=False)
    group = TensorParallelGroup.from_process_group(dist.group.WORLD, device=DEVICE, timeout_s=20, all_reduce="gloo")
    check_group(group)
    was_closed = group.is_closed
    Seat.of = classmethod(lambda cls, device: cls("host", "GPU-1"))
    try:
        TensorParallelGroup.from_process_group(dist.group.WORLD, device=DEVICE, timeout_s=20)
        refusal = ""
    except EnvironmentMismatchError as exc:
        refusal = str(exc)
    group.close()
    said = {"name": group.all_reduce_choice.name, "backend": dist.get_backend(), "refusal": refusal}
    print(json.dumps({**said, "closed": [was_closed, group.is_closed]}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
