"""SymmMemAllReduce: small sums over the CUDA devices of one host in one kernel, through torch's symmetric memory.

    rank 0   copy own into window ─┐ signal ┌─ read all windows, add ── write ─┐ signal ┌─ next
    rank 1   copy own into window ─┘        └─ read all windows, add ── write ─┘        └─ next

One trip instead of a ring: what counts for the few tokens of a decode step is latency. Every rank reads all windows
whole, so larger tensors go to `other`, by their size and type alone, which are the same on every rank.

A kernel that waits for a rank which has died waits for ever: the host must not wait for it without looking whether the
group has failed, and the device stays busy until its process ends.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from inference_shardformer.distributed.all_reduce import AllReduce, Refusal
from inference_shardformer.distributed.devices import Seat
from inference_shardformer.errors import EnvironmentMismatchError

NAME = "symm_mem"
MAX_RANKS = 8
DTYPES = (torch.bfloat16, torch.float32)  # what torch's kernel adds
_OPERATOR = "one_shot_all_reduce_copy_out"
_ALIGNMENT = 16  # bytes that a thread of the kernel moves at once
_LARGEST = {2: 1 << 20, 4: 1 << 19, MAX_RANKS: 1 << 18}  # ranks to bytes: all windows together stay within 2 MiB
_LEAVE = "leave shard.all_reduce at auto"
_USE_NCCL = f"{_LEAVE}: nccl serves"
_KEPT: list[torch.Tensor] = []  # windows that a kernel may still wait in


class Window(NamedTuple):
    """Memory of this rank that the devices of all ranks have mapped, at an address that stays."""

    memory: torch.Tensor  # uint8 [num_bytes]
    group_name: str


class SymmMemAllReduce(AllReduce):
    """Sums small tensors in one kernel, which can be captured. All others go to `other`."""

    name = NAME

    def __init__(self, window: Window, other: AllReduce) -> None:
        self._window = window
        self._largest = window.memory.numel()
        self.scope = f"bf16 and fp32 of up to {self._largest >> 10} KiB at once; {other.name} adds up the rest"
        self._other = other

    def __call__(self, t: torch.Tensor) -> None:
        """Sum in the type of the tensor."""
        num_bytes = t.numel() * t.element_size()
        if t.dtype not in DTYPES or not 0 < num_bytes <= self._largest or num_bytes % _ALIGNMENT:
            self._other(t)
            return
        is_ready = t.is_contiguous() and t.storage_offset() * t.element_size() % _ALIGNMENT == 0
        own = t if is_ready else t.clone(memory_format=torch.contiguous_format)
        window, flat = self._window.memory[:num_bytes].view(t.dtype), own.view(-1)
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(window, flat, "sum", self._window.group_name, flat)
        if own is not t:
            t.copy_(own)

    def close(self) -> None:
        """Keep the window where a kernel may still be waiting in it: giving it back would wait for that kernel."""
        memory = self._window.memory
        if memory.is_cuda and not torch.cuda.current_stream(memory.device).query():
            _KEPT.append(memory)


def local_problem(device: torch.device) -> Refusal | None:
    """What this rank lacks for symmetric memory."""
    if device.type != "cuda":
        return Refusal("device", f"tensors are on {device.type}; symmetric memory is for CUDA devices", _LEAVE)
    if not hasattr(torch.ops.symm_mem, _OPERATOR) or not hasattr(_torch_module(), "rendezvous"):
        message = f"torch {torch.__version__} has no symm_mem::{_OPERATOR}"
        return Refusal("torch", message, f"{_USE_NCCL}; or install a newer torch")
    return None


def reasons(seats: list[Seat], problems: list[Refusal | None]) -> list[Refusal]:
    """Every reason why these ranks cannot share symmetric memory, given what each of them sees and lacks."""
    found = [Refusal(p.code, f"rank {rank}: {p.message}", p.remedy) for rank, p in enumerate(problems) if p]
    if len(seats) > MAX_RANKS:
        found.append(Refusal("ranks", f"{len(seats)} ranks are more than {MAX_RANKS}", _USE_NCCL))
    odd = next((rank for rank, seat in enumerate(seats) if seat.host != seats[0].host), 0)
    if odd:
        message = f"ranks 0 and {odd} run on different hosts"
        return [*found, Refusal("hosts", message, f"{_USE_NCCL}; start all ranks of a group on one host")]
    for rank, seat in enumerate(seats):
        others = {each.device: number for number, each in enumerate(seats) if number != rank}
        if seat.device and seat.device in others and rank < others[seat.device]:
            message = f"ranks {rank} and {others[seat.device]} have the same CUDA device"
            found.append(Refusal("shared_device", message, "give each rank a device of its own"))
        far = [others[device] for device in seat.visible if device in others and device not in seat.reachable]
        if far:
            message = f"the device of rank {rank} cannot access those of ranks {far}"
            found.append(Refusal("peer_access", message, f"{_USE_NCCL}; peer access needs NVLink or one PCIe switch"))
    return found


def make_window(device: torch.device, *, size: int, group_name: str) -> Window:
    """Memory for so many ranks, not shared yet. Raises `RuntimeError` where it cannot be had."""
    num_bytes = next(largest for ranks, largest in _LARGEST.items() if size <= ranks)
    return Window(_torch_module().empty(num_bytes, dtype=torch.uint8, device=device), group_name)


def share(window: Window) -> None:
    """Map the windows of all ranks; all of them call this. Raises `RuntimeError` where that is impossible."""
    _torch_module().rendezvous(window.memory, window.group_name)


def wrong_sum(sums: AllReduce, plain: AllReduce, device: torch.device, *, rank: int, timeout_s: float) -> str:
    """How sums of whole numbers, which every type holds, differ from those of the process group; empty if they do not.

    All ranks call this. Raises `EnvironmentMismatchError` where they do not come to an end.
    """
    for dtype in DTYPES:
        for count in (8, 4096, 4096, 100_000):
            ours = (torch.arange(count, device=device) % 11 + rank).to(dtype)
            expected = ours.clone()
            plain(expected)
            sums(ours)
            num_wrong = (ours != expected).sum()
            _await(device, timeout_s)
            if num_wrong.item():
                return f"{num_wrong.item()} of {count} sums of {dtype} are not those of {plain.name}"
    return ""


def _await(device: torch.device, timeout_s: float) -> None:
    """Wait for everything the device was given, but not for ever."""
    if device.type != "cuda":
        return
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    end = time.monotonic() + timeout_s
    while not event.query():
        if time.monotonic() > end:
            raise EnvironmentMismatchError(
                f"a sum through symmetric memory did not come to an end within {timeout_s:g} s",
                remedy="set shard.all_reduce=nccl, and start the ranks again: their devices are still waiting",
            )
        time.sleep(1e-4)


def _torch_module() -> Any:
    """torch's symmetric memory, which is not imported where nobody asks for it."""
    import torch.distributed._symmetric_memory as symmetric_memory

    return symmetric_memory
