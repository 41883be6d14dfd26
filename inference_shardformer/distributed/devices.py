"""Which CUDA device a rank has, and who shares one: NCCL takes one device from each rank, gloo any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from inference_shardformer.distributed.all_reduce import AllReduceRequest
from inference_shardformer.distributed.environment import RankEnvironment
from inference_shardformer.errors import EnvironmentMismatchError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SHARE = (
    "start at most as many ranks on a host as it has devices; or set shard.all_reduce=gloo, which lets ranks share a "
    "device and adds up on the host: right, and slow"
)


class Seat(NamedTuple):
    """A device as other ranks know it: its host, its identity if known, and what it sees and reaches of the others."""

    host: str
    device: str
    visible: tuple[str, ...] = ()
    reachable: tuple[str, ...] = ()

    @classmethod
    def of(cls, device: torch.device) -> Seat:
        """Where this rank sits. Only CUDA devices have an identity."""
        host = boot_id()
        if device.type != "cuda":
            return cls(host, "")
        own = torch.cuda.current_device() if device.index is None else device.index
        others = [index for index in range(torch.cuda.device_count()) if index != own]
        reachable = [index for index in others if torch.cuda.can_device_access_peer(own, index)]
        return cls(host, _identity(own), tuple(map(_identity, others)), tuple(map(_identity, reachable)))

    def to_json(self) -> str:
        """The inverse of `from_json`."""
        return json.dumps(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> Seat:
        """A seat that another rank sent."""
        host, device, visible, reachable = json.loads(text)
        return cls(host, device, tuple(visible), tuple(reachable))


def device_of_rank(device_type: str, environment: RankEnvironment, *, all_reduce: AllReduceRequest) -> torch.device:
    """The device of this rank: the one of its local rank. Where sums go through gloo, ranks share in turn.

    Raises `EnvironmentMismatchError` where the host has fewer devices than ranks and they may not share.
    """
    if device_type != "cuda":
        return torch.device(device_type)
    local_rank, count = environment.local_rank, torch.cuda.device_count()
    if local_rank < count:
        return torch.device("cuda", local_rank)
    if all_reduce == "gloo":
        return torch.device("cuda", local_rank % count)
    raise EnvironmentMismatchError(
        f"local rank {local_rank} has no CUDA device of its own: this process sees {count}, and "
        f"{environment.local_world_size} ranks run on this host",
        remedy=_SHARE,
    )


def refuse_shared_devices(device: torch.device, gather: Callable[[bytes], list[bytes]]) -> list[Seat]:
    """Every rank's seat; all ranks call this together, before NCCL finds out in the middle of something.

    Raises `EnvironmentMismatchError` on every rank where two have the same device.
    """
    seats = [Seat.from_json(each) for each in gather(Seat.of(device).to_json().encode())]
    first: dict[tuple[str, str], int] = {}
    for rank, seat in enumerate(seats):
        other = first.setdefault((seat.host, seat.device), rank)
        if other != rank and seat.device:
            raise EnvironmentMismatchError(
                f"ranks {other} and {rank} have the same CUDA device ({seat.device}), which NCCL refuses",
                remedy=f"{_SHARE}; ranks that no launcher started get their device by LOCAL_RANK",
            )
    return seats


def boot_id() -> str:
    """Differs between machines; empty where the system has none."""
    return _BOOT_ID.read_text(encoding="ascii").strip() if _BOOT_ID.exists() else ""


def _identity(index: int) -> str:
    """Equal for one device in all processes, whatever each of them sees; empty where torch does not tell."""
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
