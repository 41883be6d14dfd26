"""Requirement: a foreign library that a backend declares; ProbeResult: what became of it on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

from inference_shardformer.probing.facts import DeviceFacts, HostFacts, Platform

Status = Literal["ok", "missing", "abi_mismatch", "wrong_device", "too_old", "broken"]


@dataclass(frozen=True)
class Requirement:
    """A foreign library, the hardware on which it works, and how to get it.

    `module` is what a probe imports, `names` are what it must offer then (dotted ones are followed). The version of
    `distribution` counts, by default that of the module's first part. No `platforms` means all of them.
    """

    module: str
    remedy: str
    distribution: str = ""
    min_version: str = ""
    names: tuple[str, ...] = ()
    platforms: tuple[Platform, ...] = ()
    min_capability: tuple[int, int] | None = None  # of an NVIDIA device
    isa: tuple[str, ...] = ()  # instruction sets of the processor, all of them
    max_capability: tuple[int, int] | None = None  # the last one it works on, of an NVIDIA device

    @property
    def package(self) -> str:
        """The top-level package of the module."""
        return self.module.split(".")[0]

    def hardware_problem(self, host: HostFacts, device: DeviceFacts) -> str | None:
        """Why the library cannot work on `device` of `host`, whether installed or not; `None` if it can."""
        if self.platforms and device.platform not in self.platforms:
            return f"{self.package} works on {' or '.join(self.platforms)}, this is {device.platform} ({device.name})"
        capability = device.capability
        if self.min_capability is not None and capability is not None and capability < self.min_capability:
            return (
                f"{self.package} needs compute capability {_dotted(self.min_capability)}, "
                f"{device.name} has {_dotted(capability)}"
            )
        if self.max_capability is not None and capability is not None and capability > self.max_capability:
            return (
                f"{self.package} works up to compute capability {_dotted(self.max_capability)}, "
                f"{device.name} has {_dotted(capability)}"
            )
        absent = [name for name in self.isa if name not in host.cpu.isa]
        if absent:
            return f"{self.package} needs the instruction sets {', '.join(absent)}, which {host.cpu.name} lacks"
        return None


@dataclass(frozen=True)
class ProbeResult:
    """The outcome of one probe. `detail` says what happened, `remedy` what to do about it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    status: Status
    version: str = ""
    detail: str = ""
    remedy: str = ""

    def to_json(self) -> str:
        """One line of JSON."""
        return _adapter().dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> ProbeResult:
        """Read what `to_json` wrote; an unknown field or status is a `ValueError`."""
        return _adapter().validate_json(text)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


@cache
def _adapter() -> TypeAdapter[ProbeResult]:
    return TypeAdapter(ProbeResult)
