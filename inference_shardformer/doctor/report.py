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
class Memory:
    """Main memory in bytes. `limit` is that of the control group."""

    __pydantic_config__ = _EXACT

    total: int
    available: int
    limit: int | None


@dataclass(frozen=True)
class RankReport:
    """One rank."""

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
    memory: Memory
    environment: Mapping[str, str]
    plugins: Mapping[str, str]
    attention: AttentionReport
    problems: tuple[str, ...] = ()

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
