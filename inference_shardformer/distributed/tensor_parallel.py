"""TensorParallelGroup: the collectives of one tensor-parallel group, over connections of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from inference_shardformer.errors import EnvironmentMismatchError, InferenceShardformerError, StateError

_HEADER_BYTES = 8
_INLINE_BYTES = 1024 - _HEADER_BYTES
_JOIN_TIMEOUT_S = 60.0  # ranks arrive as far apart as their imports take


class TensorParallelGroup:
    """Collectives over the ranks that share one model. `rank` and `size` are those of the group, not of the world.

    The group owns its connections: aborting or closing it leaves the caller's process group as it was, and several
    groups may live beside each other. `num_collectives` counts the collectives entered here; the rank with the lowest
    count is the one that the others wait for. `is_in_collective` stays true when a collective failed.
    """

    def __init__(
        self, data: dist.ProcessGroup | None, control: dist.ProcessGroup | None, *, device: torch.device
    ) -> None:
        self.device = device
        self.rank = data.rank() if data is not None else 0
        self.size = data.size() if data is not None else 1
        self.num_collectives = 0
        self.is_in_collective = False
        self._data = data
        self._control = control
        self._sum = dist.AllreduceOptions() if data is not None else None

    @classmethod
    def single(cls, device: torch.device) -> TensorParallelGroup:
        """A group of one rank, which needs no `torch.distributed`."""
        return cls(None, None, device=device)

    @classmethod
    def from_process_group(
        cls, process_group: dist.ProcessGroup, *, device: torch.device, timeout_s: float
    ) -> TensorParallelGroup:
        """A group over the ranks of `process_group`; all of them must call this. `timeout_s` bounds one collective."""
        if process_group.size() == 1:
            return cls.single(device)
        rank, size, timeout = process_group.rank(), process_group.size(), timedelta(seconds=timeout_s)
        with joining(size):
            store = dist.PrefixStore(_agree_on_name(process_group, device, timeout_s), _get_default_store())
            gloo = dist.ProcessGroupGloo(dist.PrefixStore("control", store), rank, size, timeout)
            control = data = cast(dist.ProcessGroup, gloo)
            if device.type != "cpu":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                nccl = dist.ProcessGroupNCCL(dist.PrefixStore("data", store), rank, size, options)
                data = cast(dist.ProcessGroup, nccl)
        return cls(data, control, device=device)

    def all_reduce(self, t: torch.Tensor) -> torch.Tensor:
        """Sum `t` over the ranks, in place; returns `t`."""
        if self.size == 1:
            return t
        self._run((self._data or _closed()).allreduce, [t], self._sum)
        return t

    def all_gather(self, t: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate every rank's `t` along `dim`, in rank order. All ranks bring the same shape."""
        if self.size == 1:
            return t
        parts = t.new_empty((self.size, *t.shape)).unbind(0)
        self._run((self._data or _closed()).allgather, [list(parts)], [t.contiguous()])
        return torch.cat(parts, dim=dim)

    def broadcast(self, t: torch.Tensor, *, src: int = 0) -> torch.Tensor:
        """Overwrite `t` with that of group rank `src`, in place; returns `t`."""
        if self.size > 1:
            self._send(self._data or _closed(), t, src)
        return t

    def broadcast_bytes(self, payload: bytes | None, *, src: int = 0) -> bytes:
        """Hand a small message of group rank `src` to every rank: one collective up to about 1 KiB, else two.

        What the other ranks pass as `payload` is ignored. The message travels over the host, never over the device.
        """
        message = payload or b""
        if self.size == 1:
            return message
        control = self._control or _closed()
        first = torch.zeros(_HEADER_BYTES + _INLINE_BYTES, dtype=torch.uint8)
        if self.rank == src:
            head = len(message).to_bytes(_HEADER_BYTES, "little") + message[:_INLINE_BYTES]
            first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._send(control, first, src)
        received = first.numpy().tobytes()
        length = int.from_bytes(received[:_HEADER_BYTES], "little")
        if length <= _INLINE_BYTES:
            return received[_HEADER_BYTES : _HEADER_BYTES + length]
        whole = bytearray(message if self.rank == src else length)
        self._send(control, torch.frombuffer(whole, dtype=torch.uint8), src)
        return bytes(whole)

    def all_gather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's small message, in rank order. Messages may differ in length."""
        return [self.broadcast_bytes(payload, src=rank) for rank in range(self.size)]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            self._run((self._control or _closed()).barrier)

    def abort(self) -> None:
        """Give the connections up without waiting for anybody; may be called from any thread.

        Peers that wait for this rank get an error at once. A collective in which this rank itself is blocked ends when
        a peer gives up too, or after the group's timeout; a device's collectives are cancelled.
        """
        data = self._data
        self.close()
        if self.device.type != "cpu" and data is not None:
            data.abort()

    def close(self) -> None:
        """Give the connections back. Collectives are illegal afterwards. Idempotent."""
        self._data = self._control = None

    def _send(self, backend: dist.ProcessGroup, t: torch.Tensor, src: int) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = src
        self._run(backend.broadcast, [t], options)

    def _run(self, collective: Callable[..., dist.Work], *arguments: object) -> None:
        self.num_collectives += 1
        self.is_in_collective = True
        collective(*arguments).wait()
        self.is_in_collective = False


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
    work.wait(timedelta(seconds=max(timeout_s, _JOIN_TIMEOUT_S)))
    return f"inference_shardformer/{bytes(name.tolist()).hex()}"


def _closed() -> dist.ProcessGroup:
    raise StateError(
        "this tensor-parallel group is closed", remedy="collectives are legal only before close() or a failure"
    )
