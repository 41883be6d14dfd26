"""HostFacts: a machine as plain values, to and from JSON; what selection knows of hardware, and all it knows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

# "rocm" is AMD through torch's device type "cuda".
Platform = Literal["cpu", "cuda", "rocm", "mps", "xpu"]

_EXACT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class CpuFacts:
    """A processor. `isa` holds the vector and matrix instruction sets by the kernel's names, sorted."""

    __pydantic_config__ = _EXACT

    architecture: str  # x86_64, aarch64
    name: str
    isa: tuple[str, ...] = ()


@dataclass(frozen=True)
class DeviceFacts:
    """One device. `capability` is the compute capability of an NVIDIA device."""

    __pydantic_config__ = _EXACT

    platform: Platform
    name: str
    capability: tuple[int, int] | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class HostFacts:
    """A machine: processor, accelerators in torch's order, versions, and the process-group back ends torch brings."""

    __pydantic_config__ = _EXACT

    cpu: CpuFacts
    accelerators: tuple[DeviceFacts, ...] = ()
    torch: str = ""
    triton: str | None = None
    process_group_backends: tuple[str, ...] = ()

    def device(self, device_type: str, index: int | None = None) -> DeviceFacts | None:
        """The device that torch calls `device_type:index`; `None` when this machine has no such device."""
        if device_type == "cpu":
            return DeviceFacts("cpu", self.cpu.name)
        ours = [device for device in self.accelerators if torch_device_type(device.platform) == device_type]
        return ours[index or 0] if (index or 0) < len(ours) else None

    def to_json(self) -> str:
        """One line of JSON."""
        return _adapter().dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> HostFacts:
        """Read what `to_json` wrote; an unknown or missing field is a `ValueError`."""
        return _adapter().validate_json(text)


def torch_device_type(platform: Platform) -> str:
    """What torch calls a device of this platform."""
    return "cuda" if platform == "rocm" else platform


@cache
def _adapter() -> TypeAdapter[HostFacts]:
    return TypeAdapter(HostFacts)
