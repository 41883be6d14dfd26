"""RankReport: everything one rank found out about itself, as plain values, to and from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

from inference_shardformer.probing.facts import HostFacts

SCHEMA_VERSION = 1
_EXACT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class ReasonReport:
    """Why a backend cannot serve."""

    __pydantic_config__ = _EXACT

    code: str
    message: str
    remedy: str


@dataclass(frozen=True)
class BackendReport:
    """One candidate, who brought it, and every reason against it."""

    __pydantic_config__ = _EXACT

    name: str
    origin: str
    verdict: Literal["chosen", "could serve", "refused"]
    reasons: tuple[ReasonReport, ...] = ()


@dataclass(frozen=True)
class ProofReport:
    """How the chosen backend's run against the reference ended."""

    __pydantic_config__ = _EXACT

    outcome: Literal["passed", "failed", "not run"]
    detail: str = ""
    remedy: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class AttentionReport:
    """The backends for one spec. `spec` is that of this rank; `of` says what it describes."""

    __pydantic_config__ = _EXACT

    of: str
    spec: Mapping[str, str]
    requested: str
    backends: tuple[BackendReport, ...]
    proof: ProofReport

    @property
    def chosen(self) -> str | None:
        """The backend that an engine would take, proven or not."""
        return next((backend.name for backend in self.backends if backend.verdict == "chosen"), None)

    @property
    def can_serve(self) -> bool:
        """Whether a backend was chosen and has proven itself."""
        return self.proof.outcome == "passed"


@dataclass(frozen=True)
class CpuUse:
    """Cores and threads. `cores` are those this process may use, `quota` the limit of its control group in cores."""

    __pydantic_config__ = _EXACT

    cores: int
    quota: float | None
    threads: int  # that a rank of ours would use
    threads_reason: str
    openmp: tuple[str, ...] = ()  # runtimes that are loaded

    @property
    def usable(self) -> float:
        """Cores' worth of time that this process can get."""
        return float(self.cores) if self.quota is None else min(float(self.cores), self.quota)


@dataclass(frozen=True)
class NativeReport:
    """The library of native CPU kernels: `problem` says why there is none, else the levels are set, lowest first."""

    __pydantic_config__ = _EXACT

    path: str
    isa_level: str = ""  # the one in use
    isa_levels: tuple[str, ...] = ()
    is_stale: bool = False  # its sources have changed since it was built
    problem: ReasonReport | None = None


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes. `limit` is that of the control group."""

    __pydantic_config__ = _EXACT

    total: int
    available: int
    limit: int | None


@dataclass(frozen=True)
class BridgeReport:
    """ColossalAI beside us: what it lacks, and the defects of its that the bridge works around while it shards."""

    __pydantic_config__ = _EXACT

    version: str
    missing: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()
    remedy: str = ""


@dataclass(frozen=True)
class RankReport:
    """One rank. `attention` is for the first layer and those like it, `other_layers` for each other group of layers."""

    __pydantic_config__ = _EXACT

    rank: int
    world_size: int
    ranks_on_host: int
    hostname: str
    versions: Mapping[str, str | None]
    host: HostFacts
    device: str
    device_reason: str
    cpu_use: CpuUse
    native: NativeReport
    memory: Memory
    environment: Mapping[str, str]
    plugins: Mapping[str, str]
    attention: AttentionReport
    other_layers: tuple[AttentionReport, ...] = ()
    problems: tuple[str, ...] = ()
    bridge: BridgeReport | None = None  # where ColossalAI is installed

    @property
    def layers(self) -> tuple[AttentionReport, ...]:
        """The reports for all groups of layers."""
        return (self.attention, *self.other_layers)

    @property
    def chosen(self) -> tuple[str | None, ...]:
        """The backend of each group of layers; `None` for a group without one."""
        return tuple(each.chosen for each in self.layers)

    def to_json(self) -> str:
        """One line of JSON."""
        return _adapter().dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> RankReport:
        """Read what `to_json` wrote; an unknown or missing field is a `ValueError`."""
        return _adapter().validate_json(text)


@cache
def _adapter() -> TypeAdapter[RankReport]:
    return TypeAdapter(RankReport)
