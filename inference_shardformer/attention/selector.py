"""Which attention backend serves a spec, and why not the others; the one place that constructs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from inference_shardformer.attention.base import AttentionBackend, AttentionSpec, Reason
from inference_shardformer.attention.proof import prove
from inference_shardformer.errors import BackendUnavailableError, PluginError
from inference_shardformer.plugins import Registry

ENTRY_POINT_GROUP = "inference_shardformer.attention_backends"

# Preferred first, by device type. Plug-ins follow in order of their names; the reference is last, being slow.
_PREFERRED = {"cpu": ("sdpa",), "cuda": ("sdpa",)}
_LAST = "reference"


class Verdict(NamedTuple):
    """One candidate and every reason against it; without reasons it can serve."""

    name: str
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Selection:
    """The chosen backend, what was asked for (`auto` or a name), and a verdict on every candidate in order."""

    name: str
    requested: str
    verdicts: tuple[Verdict, ...]

    def explain(self) -> str:
        """The choice and every verdict, one candidate a line."""
        lines = [f"attention backend {self.name} (asked for: {self.requested})"]
        for verdict in self.verdicts:
            able = "chosen" if verdict.name == self.name else "could serve"
            lines.append(f"  {verdict.name}: {_refusal(verdict) if verdict.reasons else able}")
        return "\n".join(lines)


def _contract_problem(loaded: object) -> str | None:
    if not (isinstance(loaded, type) and issubclass(loaded, AttentionBackend)):
        return f"{loaded!r} is not a subclass of AttentionBackend"
    expected = AttentionBackend.contract_version
    if loaded.contract_version != expected:
        return f"it is written for contract {loaded.contract_version}, this is contract {expected}"
    return None


def make_registry() -> Registry[type[AttentionBackend]]:
    """A registry with the built-in backends; installed plug-ins are found when its names are asked for."""
    registry: Registry[type[AttentionBackend]] = Registry(
        "attention backend", entry_point_group=ENTRY_POINT_GROUP, check=_contract_problem
    )
    registry.register("sdpa", "inference_shardformer.attention.sdpa:SdpaAttention")
    registry.register("reference", "inference_shardformer.attention.reference:ReferenceAttention")
    return registry


BACKENDS = make_registry()


def candidates(device_type: str, registry: Registry[type[AttentionBackend]] = BACKENDS) -> tuple[str, ...]:
    """Every registered backend, the preferred one on this type of device first."""
    names = registry.names()
    first = [name for name in _PREFERRED.get(device_type, ()) if name in names]
    last = [_LAST] if _LAST in names else []
    return (*first, *sorted(set(names) - {*first, *last}), *last)


def select(spec: AttentionSpec, requested: str, registry: Registry[type[AttentionBackend]] = BACKENDS) -> Selection:
    """Choose a backend: `auto` takes the first candidate without reasons, a name is used or refused, never replaced.

    A plug-in that does not load is a verdict, unless it was asked for: then its `PluginError` is raised. Raises
    `BackendUnavailableError` if the name is unknown or refused, or if no candidate can serve.
    """
    names = candidates(spec.device.type, registry)
    if requested not in ("auto", *names):
        raise BackendUnavailableError(
            registry.unknown(requested), remedy="set attention.backend to auto or to a known name"
        )
    if requested != "auto":
        registry.get(requested)
    verdicts = tuple(Verdict(name, _reasons(name, spec, registry)) for name in names)
    able = [verdict.name for verdict in verdicts if not verdict.reasons]
    wanted = able[:1] if requested == "auto" else [requested]
    if not set(wanted) & set(able):
        raise _refused(requested, verdicts, able)
    return Selection(wanted[0], requested, verdicts)


def build(
    selection: Selection, spec: AttentionSpec, registry: Registry[type[AttentionBackend]] = BACKENDS
) -> AttentionBackend:
    """Construct the chosen backend and let it prove itself, before any weight is read.

    Raises `BackendUnavailableError` if it fails or differs from the reference.
    """
    backend = registry.get(selection.name)(spec)
    prove(backend, spec)
    return backend


def _reasons(name: str, spec: AttentionSpec, registry: Registry[type[AttentionBackend]]) -> tuple[Reason, ...]:
    try:
        backend = registry.get(name)
    except PluginError as exc:
        return (Reason("plugin", exc.message, exc.remedy),)
    return tuple(backend.reasons(spec))


def _refused(requested: str, verdicts: tuple[Verdict, ...], able: list[str]) -> BackendUnavailableError:
    """The error for a name that cannot serve, or for `auto` when nothing can."""
    if requested == "auto":
        every = "\n".join(f"  {verdict.name}: {_refusal(verdict)}" for verdict in verdicts)
        return BackendUnavailableError(f"no attention backend can serve this model:\n{every}", remedy=_fix(verdicts))
    mine = tuple(verdict for verdict in verdicts if verdict.name == requested)
    others = f"; or set attention.backend to auto or to one that can serve: {', '.join(able)}" if able else ""
    return BackendUnavailableError(
        f"attention backend {requested!r} cannot serve this model: {_refusal(mine[0])}", remedy=_fix(mine) + others
    )


def _refusal(verdict: Verdict) -> str:
    return "; ".join(f"{reason.message} [{reason.code}]" for reason in verdict.reasons)


def _fix(verdicts: tuple[Verdict, ...]) -> str:
    """The remedies of all reasons, each once."""
    return "; ".join(dict.fromkeys(reason.remedy for verdict in verdicts for reason in verdict.reasons))
