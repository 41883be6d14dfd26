"""The ranks of one shardformer: device, tensor-parallel group and guard, made together and closed together."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import torch

from inference_shardformer.config.shard import ShardConfig
from inference_shardformer.distributed.devices import device_of_rank
from inference_shardformer.distributed.environment import RankEnvironment, ensure_process_group, process_group_for
from inference_shardformer.distributed.guard import RankGuard
from inference_shardformer.distributed.simulated.seat import SimulatedSeat
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.resolving.resolution import resolve_device

if TYPE_CHECKING:
    import torch.distributed as dist


class Ranks:
    """This rank's device and its ties to the other ranks. `ranks_on_host` counts those that share its memory."""

    def __init__(
        self, group: TensorParallelGroup, guard: RankGuard, *, device_reason: str, made_default_group: bool
    ) -> None:
        self.group = group
        self.guard = guard
        self.device = group.device
        self.device_reason = device_reason
        hosts = group.all_gather_bytes(socket.gethostname().encode())
        self.ranks_on_host = hosts.count(hosts[group.rank])
        self._made_default_group = made_default_group
        self._process = os.getpid()

    @classmethod
    def join(cls, shard: ShardConfig, process_group: dist.ProcessGroup | SimulatedSeat | None) -> Ranks:
        """Join the ranks of `process_group`, else of the default group, else of the launcher, else this process alone.

        A default group is made only where the launcher's environment asks for one and none exists. Raises
        `EnvironmentMismatchError` if the number of ranks is not `shard.tp_size`.
        """
        if isinstance(process_group, SimulatedSeat):
            asked = None if shard.tp_size == "auto" else shard.tp_size
            simulated, simulated_guard = process_group.join(asked, all_reduce=shard.all_reduce)
            reason = "simulated ranks run on the CPU"
            return cls(simulated, simulated_guard, device_reason=reason, made_default_group=False)
        device_type, device_reason = resolve_device(shard)
        device = device_of_rank(device_type, RankEnvironment.detect(), all_reduce=shard.all_reduce)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what launches kernels by itself takes the current device
        made_default_group = process_group is None and ensure_process_group(
            device, shard.timeout_s, with_nccl=shard.all_reduce != "gloo"
        )
        tp_size = None if shard.tp_size == "auto" else shard.tp_size
        members = process_group_for(tp_size, process_group)
        if members is None:
            group = TensorParallelGroup.single(device)
        else:
            group = TensorParallelGroup.from_process_group(
                members, device=device, timeout_s=shard.timeout_s, all_reduce=shard.all_reduce
            )
        guard = RankGuard(group, timeout_s=shard.timeout_s)
        return cls(group, guard, device_reason=device_reason, made_default_group=made_default_group)

    def close(self) -> None:
        """Leave: stop the guard, close the group, and end the default group if it was made here. Idempotent."""
        import torch.distributed as dist

        self.guard.close()
        self.group.close()
        if self._made_default_group and dist.is_initialized() and os.getpid() == self._process:
            dist.destroy_process_group()
        self._made_default_group = False
