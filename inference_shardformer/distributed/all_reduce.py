"""AllReduce: the ways to sum a tensor over the ranks of a group. One is chosen when the group is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

AllReduceRequest = Literal["auto", "none", "shm", "symm_mem", "gloo", "nccl", "simulated"]


class Refusal(NamedTuple):
    """Why an all-reduce cannot serve a group: a stable code, a sentence, and what to do about it."""

    code: str
    message: str
    remedy: str


class AllReduce(ABC):
    """Sums tensors over the ranks. All ranks call it in the same order with tensors of one shape and type."""

    name: str
    scope: str = ""  # what it adds up itself, where that is not everything

    @abstractmethod
    def __call__(self, t: torch.Tensor) -> None:
        """Replace `t` by the sum. Raises a `RuntimeError` when another rank died, gave up or stayed away."""

    def close(self) -> None:
        """Take no further part, from any thread; ranks that wait for this one are told. Idempotent."""
        return


class ProcessGroupAllReduce(AllReduce):
    """torch's own: gloo on a CPU, NCCL on CUDA devices."""

    def __init__(self, process_group: dist.ProcessGroup, *, name: str) -> None:
        self.name = name
        self._process_group = process_group
        self._sum = dist.AllreduceOptions()

    def __call__(self, t: torch.Tensor) -> None:
        """Sum by the process group's collective."""
        self._process_group.allreduce([t], self._sum).wait()


@dataclass(frozen=True)
class AllReduceChoice:
    """The all-reduce of a group and why it is not another one; the same on every rank. "none": there is one rank."""

    name: str
    requested: AllReduceRequest = "auto"
    refused: tuple[tuple[str, tuple[Refusal, ...]], ...] = ()  # by name, those that were preferred and cannot serve
    scope: str = ""  # what it adds up, and what does the rest

    @property
    def reason(self) -> str:
        """Why it was chosen, in a few words."""
        if self.name == "none":
            return "one rank has nothing to add up"
        refused = "; ".join(f"{name} cannot: {reasons[0].message}" for name, reasons in self.refused)
        return refused or self.scope or "the first that all ranks can use"
