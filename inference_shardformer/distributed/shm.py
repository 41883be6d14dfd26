"""ShmAllReduce: sums and exchanges between the ranks of one host through shared memory, by the native kernels.

The sum is made in the order of the ranks, in float32, and rounded once to the type of the tensor: every rank gets the
same bits, run after run. gloo rounds after each rank and adds in the order of a ring, so in 16-bit types its results
differ in the last place.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from inference_shardformer.distributed.all_reduce import AllReduce, Refusal
from inference_shardformer.distributed.devices import boot_id
from inference_shardformer.distributed.exchange import Exchange
from inference_shardformer.distributed.segment import Segment
from inference_shardformer.errors import StateError
from inference_shardformer.kernels.cpu.arguments import DTYPES
from inference_shardformer.kernels.cpu.library import NativeUnavailableError, native, native_problem

BUFFER_BYTES = 512 * 1024
MAX_RANKS = 64
_LINE_BYTES = 128
_FIRST_SPIN_NS = 100_000
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_USE_GLOO = "nothing is wrong: gloo serves"


class ShmGroup(ctypes.Structure):
    """A process's view of the group; `ShmGroup` of `shm.h`."""

    _fields_ = [
        ("memory", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("buffer_bytes", "timeout_ns", "spin_ns")),
        *((name, ctypes.c_int32) for name in ("fd", "rank", "size")),
        *((name, ctypes.c_uint32) for name in ("arrivals", "sums")),
        *((name, ctypes.c_int32) for name in ("failure", "culprit", "is_ahead")),
    ]


class ShmAllReduceArgs(ctypes.Structure):
    """Arguments of `shm_all_reduce`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("group", "data")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("dtype", "unused")),
    ]


class ShmExchangeArgs(ctypes.Structure):
    """Arguments of `shm_exchange`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("group", "data", "gathered")),
        ("bytes", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("source", "unused")),
    ]


class Place(NamedTuple):
    """Where a rank runs, as far as sharing memory is concerned."""

    boot: str  # differs between machines
    processes: str  # the namespace of process ids: what is visible in /proc
    user: int

    @classmethod
    def here(cls) -> Place:
        """This process's place."""
        return cls(boot_id(), os.readlink(_PID_NAMESPACE) if _PID_NAMESPACE.is_symlink() else "", os.getuid())


class ShmAllReduce(AllReduce, Exchange):
    """Sums through a segment that all ranks have mapped. Types that kernels do not add go to `other`."""

    name = "shm"

    def __init__(self, segment: Segment, *, rank: int, size: int, timeout_s: float, other: AllReduce) -> None:
        library = native()
        self._all_reduce = library.entry("shm_all_reduce", ShmAllReduceArgs)
        self._exchange = library.entry("shm_exchange", ShmExchangeArgs)
        self._leave = library.function("isf_shm_leave", argtypes=(ctypes.POINTER(ShmGroup),), restype=None)
        self._segment = segment
        self._timeout_s = timeout_s
        self._other = other
        self.group = ShmGroup(  # what `shm_all_reduce_body` takes, for a native layer that sums inside
            *(segment.address, BUFFER_BYTES, int(timeout_s * 1e9), _FIRST_SPIN_NS, segment.fd, rank, size)
        )

    @classmethod
    def reasons(cls, places: list[Place], problems: list[Refusal | None]) -> list[Refusal]:
        """Every reason why the ranks cannot share memory, given where each of them runs and what each lacks."""
        found = [Refusal(p.code, f"rank {rank}: {p.message}", p.remedy) for rank, p in enumerate(problems) if p]
        for field, code, what in (
            ("boot", "hosts", "hosts"),
            ("processes", "namespaces", "containers"),
            ("user", "users", "users"),
        ):
            values = [getattr(place, field) for place in places]
            if len(set(values)) > 1:
                odd = next(rank for rank, value in enumerate(values) if value != values[0])
                message = f"ranks 0 and {odd} run on different {what} and cannot map the same memory"
                found.append(Refusal(code, message, f"{_USE_GLOO}; start all ranks of a group in one place to use shm"))
        if len(places) > MAX_RANKS:
            found.append(Refusal("ranks", f"{len(places)} ranks are more than {MAX_RANKS}", _USE_GLOO))
        return found

    @staticmethod
    def num_bytes(size: int) -> int:
        """Bytes of the segment for so many ranks."""
        return size * (_LINE_BYTES + 2 * BUFFER_BYTES)

    def __call__(self, t: torch.Tensor) -> None:
        """Sum in float32 in the order of the ranks, and round once."""
        code = DTYPES.get(t.dtype)
        if code is None:
            self._other(t)
            return
        flat = t if t.is_contiguous() else t.contiguous()
        args = ShmAllReduceArgs(ctypes.addressof(self.group), flat.data_ptr(), flat.numel(), code)
        if self._all_reduce(args, torch.get_num_threads()):
            raise self.failure()
        if flat is not t:
            t.copy_(flat)

    def gather(self, t: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor, as `[size, *shape]`. Any type; all ranks bring the same shape."""
        flat, gathered = t.contiguous(), t.new_empty((self.group.size, *t.shape))
        self._run_exchange(flat, gathered, 0)
        return gathered

    def broadcast(self, t: torch.Tensor, src: int) -> None:
        """Overwrite `t` with that of rank `src`, which does not wait for the others. Any type."""
        flat = t if t.is_contiguous() else t.contiguous()
        self._run_exchange(flat, None, src)
        if flat is not t:
            t.copy_(flat)

    def _run_exchange(self, flat: torch.Tensor, gathered: torch.Tensor | None, src: int) -> None:
        there = None if gathered is None else gathered.data_ptr()
        num_bytes = flat.numel() * flat.element_size()
        args = ShmExchangeArgs(ctypes.addressof(self.group), flat.data_ptr(), there, num_bytes, src)
        if self._exchange(args, 1):
            raise self.failure()

    def failure(self) -> RuntimeError:
        """What the group failed with, as an error to raise."""
        culprit = self.group.culprit
        if self.group.failure == _ABORTED:
            return StateError(
                "this tensor-parallel group was closed in the middle of a collective",
                remedy="collectives are legal only before close() or a failure",
            )
        return RuntimeError(
            f"a collective over shared memory failed: rank {culprit} {_FAILURES[self.group.failure].format(self)}"
        )

    def close(self) -> None:
        """Leave, and wake whoever waits for this rank. The memory goes with the last reference."""
        self._leave(self.group)


def local_problem(device: torch.device) -> Refusal | None:
    """What this rank lacks for shared memory."""
    if device.type != "cpu":
        return Refusal("device", f"tensors are on {device.type}; shared memory is for the CPU", "nothing is wrong")
    if sys.platform != "linux":
        return Refusal("system", f"{sys.platform} has no memory without a name", _USE_GLOO)
    if problem := native_problem():
        return Refusal(*problem)
    return _layout_problem()


_ABORTED = 4
_FAILURES = {
    1: "did not come within {0._timeout_s:g} s",
    2: "has closed the group",
    3: "is dead",
    5: "brought a tensor of another size or type",
}


def _layout_problem() -> Refusal | None:
    library = native()
    try:
        library.entry("shm_all_reduce", ShmAllReduceArgs)
        sizes = [library.function(f"isf_sizeof_{name}", restype=ctypes.c_int64)() for name in ("shm_group", "shm_line")]
    except NativeUnavailableError as exc:
        return Refusal(*exc.problem)
    if sizes != [ctypes.sizeof(ShmGroup), _LINE_BYTES]:
        return Refusal("native_layout", f"{library.path} is of another version", "build the native kernels again")
    return None
