"""TensorParallelGroup: the collectives of one tensor-parallel group, over connections of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from inference_shardformer.distributed.all_reduce import (
    AllReduce,
    AllReduceChoice,
    AllReduceRequest,
    ProcessGroupAllReduce,
)
from inference_shardformer.distributed.choosing import Meeting, choose_all_reduce
from inference_shardformer.distributed.devices import refuse_shared_devices
from inference_shardformer.distributed.environment import JOIN_TIMEOUT_S
from inference_shardformer.distributed.exchange import Exchange, ProcessGroupExchange
from inference_shardformer.distributed.over_host import OverHost
from inference_shardformer.distributed.shm import ShmAllReduce
from inference_shardformer.errors import EnvironmentMismatchError, InferenceShardformerError, StateError

T = TypeVar("T")

_HEADER_BYTES = 8
_INLINE_BYTES = 1024 - _HEADER_BYTES


class TensorParallelGroup:
    """Collectives over the ranks that share one model. `rank` and `size` are those of the group, not of the world.

    The group owns its connections: aborting or closing it leaves the caller's process group as it was, and several
    groups may live beside each other. `num_collectives` counts the collectives entered here; the rank with the lowest
    count is the one that the others wait for. `is_in_collective` stays true when a collective failed.
    `all_reduce_choice` says which all-reduce was chosen and why.
    """

    def __init__(
        self, data: dist.ProcessGroup | None, control: dist.ProcessGroup | None, *, device: torch.device
    ) -> None:
        self.device = device
        self.rank = data.rank() if data is not None else 0
        self.size = data.size() if data is not None else 1
        self.num_collectives = 0
        self._process = os.getpid()
        self.is_in_collective = False
        self._data = data
        self._control = control
        self._all_reduce: AllReduce | None = None
        self._data_exchange: Exchange | None = None
        self._control_exchange: Exchange | None = None
        if data is not None and control is not None:
            self._data_exchange, self._control_exchange = ProcessGroupExchange(data), ProcessGroupExchange(control)
            self._all_reduce = ProcessGroupAllReduce(data, name="gloo" if data is control else "nccl")
            if data is control and device.type != "cpu":
                self._all_reduce = self._data_exchange = OverHost(control)
        self.all_reduce_choice = AllReduceChoice(self._all_reduce.name if self._all_reduce else "none")

    @classmethod
    def single(cls, device: torch.device) -> TensorParallelGroup:
        """A group of one rank, which needs no `torch.distributed`."""
        return cls(None, None, device=device)

    @classmethod
    def from_process_group(
        cls,
        process_group: dist.ProcessGroup,
        *,
        device: torch.device,
        timeout_s: float,
        all_reduce: AllReduceRequest = "auto",
    ) -> TensorParallelGroup:
        """A group over the ranks of `process_group`; all of them must call this. `timeout_s` bounds one collective.

        `all_reduce` names how tensors are summed: through shared memory ("shm"), through symmetric memory of CUDA
        devices ("symm_mem"), by the process group, or the first of these that all ranks can use. Shared memory also
        carries what is gathered and broadcast. On CUDA devices the process group is one of NCCL, or with "gloo" one
        that lets ranks share a device. Raises `EnvironmentMismatchError` where the named one cannot be used, or where
        NCCL would find two ranks on one device.
        """
        if process_group.size() == 1:
            return cls.single(device)
        rank, size, timeout = process_group.rank(), process_group.size(), timedelta(seconds=timeout_s)
        with joining(size):
            name = _agree_on_name(process_group, device, timeout_s)
            store = dist.PrefixStore(name, _get_default_store())
            gloo = dist.ProcessGroupGloo(dist.PrefixStore("control", store), rank, size, timeout)
            control = data = cast(dist.ProcessGroup, gloo)
            if device.type != "cpu" and all_reduce != "gloo":
                refuse_shared_devices(device, cls(control, control, device=device).all_gather_bytes)
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                nccl = dist.ProcessGroupNCCL(dist.PrefixStore("data", store), rank, size, options)
                data = cast(dist.ProcessGroup, nccl)
            group = cls(data, control, device=device)
            meeting = Meeting(rank, device, timeout_s, group.all_gather_bytes, name, process_group.group_name)
            group._choose(all_reduce, meeting)
        return group

    def all_reduce(self, t: torch.Tensor) -> torch.Tensor:
        """Sum `t` over the ranks, in place; returns `t`."""
        if self.size == 1:
            return t
        self._run(self._all_reduce or _closed(), t)
        return t

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or given up since it failed. What a device was given before may never end."""
        return self.size > 1 and self._data is None

    @property
    def shared_sums(self) -> ShmAllReduce | None:
        """The sums over shared memory, for native code that sums inside; None where they were not chosen."""
        return self._all_reduce if isinstance(self._all_reduce, ShmAllReduce) else None

    @contextmanager
    def summing(self, count: int) -> Iterator[None]:
        """Count so many sums that native code makes inside; after an error this rank counts as still in them."""
        self.num_collectives += count
        self.is_in_collective = True
        yield
        self.is_in_collective = False

    def all_gather(self, t: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate every rank's `t` along `dim`, in rank order. All ranks bring the same shape."""
        if self.size == 1:
            return t
        gathered = self._run((self._data_exchange or _closed()).gather, t)
        return torch.cat(gathered.unbind(0), dim=dim)

    def broadcast(self, t: torch.Tensor, *, src: int = 0) -> torch.Tensor:
        """Overwrite `t` with that of group rank `src`, in place; returns `t`."""
        if self.size > 1:
            self._run((self._data_exchange or _closed()).broadcast, t, src)
        return t

    def broadcast_bytes(self, payload: bytes | None, *, src: int = 0) -> bytes:
        """Hand a small message of group rank `src` to every rank: one collective up to about 1 KiB, else two.

        What the other ranks pass as `payload` is ignored. The message travels over the host, never over the device.
        """
        message = payload or b""
        if self.size == 1:
            return message
        control = self._control_exchange or _closed()
        first = torch.zeros(_HEADER_BYTES + _INLINE_BYTES, dtype=torch.uint8)
        if self.rank == src:
            head = len(message).to_bytes(_HEADER_BYTES, "little") + message[:_INLINE_BYTES]
            first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._run(control.broadcast, first, src)
        received = first.numpy().tobytes()
        length = int.from_bytes(received[:_HEADER_BYTES], "little")
        if length <= _INLINE_BYTES:
            return received[_HEADER_BYTES : _HEADER_BYTES + length]
        whole = bytearray(message if self.rank == src else length)
        self._run(control.broadcast, torch.frombuffer(whole, dtype=torch.uint8), src)
        return bytes(whole)

    def all_gather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's small message, in rank order. Messages may differ in length."""
        return [self.broadcast_bytes(payload, src=rank) for rank in range(self.size)]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            control = self._control or _closed()
            self._run(lambda: control.barrier().wait())

    def abort(self) -> None:
        """Give the connections up without waiting for anybody; may be called from any thread.

        Peers that wait for this rank get an error at once. A collective in which this rank itself is blocked ends when
        a peer gives up too, or after the group's timeout; a device's collectives are cancelled.
        """
        data, control = self._data, self._control
        self.close()
        if data is not None and data is not control:
            data.abort()

    def close(self) -> None:
        """Give the connections back. Collectives are illegal afterwards. Idempotent.

        Does nothing in a process that was forked from the rank's: connections there are copies, without their threads.
        """
        if os.getpid() != self._process:
            return
        all_reduce, self._all_reduce = self._all_reduce, None
        self._data = self._control = self._data_exchange = self._control_exchange = None
        if all_reduce is not None:
            all_reduce.close()

    def _choose(self, requested: AllReduceRequest, meeting: Meeting) -> None:
        chosen = choose_all_reduce(self._all_reduce or _closed(), meeting, requested)
        self._all_reduce, self.all_reduce_choice = chosen
        if isinstance(self._all_reduce, ShmAllReduce):
            self._data_exchange = self._control_exchange = self._all_reduce

    def _run(self, collective: Callable[..., T], *arguments: object) -> T:
        self.num_collectives += 1
        self.is_in_collective = True
        result = collective(*arguments)
        self.is_in_collective = False
        return result


@contextmanager
def joining(size: int) -> Iterator[None]:
    """Name what it means when the ranks of a new group do not find each other: torch only knows of sockets and keys."""
    try:
        yield
    except InferenceShardformerError:
        raise
    except RuntimeError as exc:
        raise EnvironmentMismatchError(
            f"not every one of the {size} ranks joined the tensor-parallel group: {exc}",
            remedy="every rank of the process group must create the engine; see whether one ended or took another path",
        ) from exc


def _agree_on_name(process_group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> str:
    """A name no other group has used, so that nothing an earlier group left in the store is ever read.

    Summing the leader's name and everybody else's zeros makes each rank wait for all others.
    """
    name = torch.frombuffer(bytearray(uuid4().bytes), dtype=torch.uint8)
    if process_group.rank() != 0:
        name = torch.zeros_like(name)
    name = name.to(device if dist.get_backend(process_group) == "nccl" else "cpu")
    work = dist.all_reduce(name, group=process_group, async_op=True)
    work.wait(timedelta(seconds=max(timeout_s, JOIN_TIMEOUT_S)))
    return f"inference_shardformer/{bytes(name.tolist()).hex()}"


def _closed() -> NoReturn:
    raise StateError(
        "this tensor-parallel group is closed", remedy="collectives are legal only before close() or a failure"
    )
