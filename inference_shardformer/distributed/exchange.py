"""Exchange: how tensors go from one rank to all, or from each to all. One is chosen when the group is made."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist


class Exchange(ABC):
    """Hands tensors round unchanged. All ranks call it in the same order with tensors of one shape and type."""

    @abstractmethod
    def gather(self, t: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor, as `[size, *shape]`."""

    @abstractmethod
    def broadcast(self, t: torch.Tensor, src: int) -> None:
        """Overwrite `t` with that of rank `src`."""


class ProcessGroupExchange(Exchange):
    """By the collectives of a process group."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._process_group = process_group

    def gather(self, t: torch.Tensor) -> torch.Tensor:
        """The process group's all-gather."""
        gathered = t.new_empty((self._process_group.size(), *t.shape))
        self._process_group.allgather([list(gathered.unbind(0))], [t.contiguous()]).wait()
        return gathered

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        """The process group's broadcast."""
        options = dist.BroadcastOptions()
        options.rootRank = src
        self._process_group.broadcast([t], options).wait()
