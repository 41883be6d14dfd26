"""OverHost: gloo for tensors of a device, carried over the host. It lets ranks share a device, and is slow."""

from __future__ import annotations

import torch
import torch.distributed as dist

from inference_shardformer.distributed.all_reduce import AllReduce, ProcessGroupAllReduce
from inference_shardformer.distributed.exchange import Exchange, ProcessGroupExchange


class OverHost(AllReduce, Exchange):
    """Every collective waits for the device, and for the other ranks."""

    name = "gloo"

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._sum = ProcessGroupAllReduce(process_group, name=self.name)
        self._exchange = ProcessGroupExchange(process_group)

    def __call__(self, t: torch.Tensor) -> None:
        """Sum on the host."""
        host = t.cpu()
        self._sum(host)
        t.copy_(host)

    def gather(self, t: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor, as `[size, *shape]`, on the device again."""
        return self._exchange.gather(t.cpu()).to(t.device)

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        """Overwrite `t` with that of rank `src`."""
        host = t.cpu()
        self._exchange.broadcast(host, src)
        t.copy_(host)
