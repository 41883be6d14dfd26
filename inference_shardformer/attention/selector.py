"""Which attention backend serves a spec, and why not the others; the one place that constructs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pydantic import BaseModel

from inference_shardformer.attention.base import AttentionBackend, AttentionSpec, Reason, Requirement
from inference_shardformer.attention.proof import prove
from inference_shardformer.attention.survey import BACKENDS, BackendRegistry, Candidate, Survey
from inference_shardformer.errors import BackendUnavailableError, InferenceShardformerError
from inference_shardformer.plugins import unknown_name

# Preferred first, by device type. Plug-ins follow in order of their names; the reference is last, being slow.
# CUDA, by what each one's kernels do (docs/gpu.md): those that split a context come before those that cannot, because a
# few long decodes would leave most of the device idle; of the first, a library that somebody installed before ours, and
# the one that needs no planning on the host before the one that does. sdpa copies all keys in every step.
_PREFERRED = {
    "cpu": ("cpu", "sdpa"),
    "cuda": ("flash_attn", "flashinfer", "triton", "flash_attn4", "varlen", "sdpa"),
}
_LAST = "reference"
_NO_SUCH_DEVICE = ("device", "device_missing")
_REPORT_IT = "choose another attention.backend, and report this with the versions of torch and of the backend"
_AUTO_OR_KNOWN = "set attention.backend to auto or to a known name"


class Verdict(NamedTuple):
    """One candidate, every reason against it, and who brought it; without reasons it can serve."""

    name: str
    reasons: tuple[Reason, ...]
    origin: str = ""


@dataclass(frozen=True)
class Selection:
    """The chosen backend, what was asked for (`auto`, `tuned` or a name), and a verdict on every candidate in order.

    `reason` says why it was chosen; empty where it is what was asked.
    """

    name: str
    requested: str
    verdicts: tuple[Verdict, ...]
    reason: str = ""

    def explain(self) -> str:
        """The choice and every verdict, one candidate a line."""
        why = f"; {self.reason}" if self.reason else ""
        lines = [f"attention backend {self.name} (asked for: {self.requested}{why})"]
        for verdict in self.verdicts:
            able = "chosen" if verdict.name == self.name else "could serve"
            lines.append(f"  {verdict.name}: {_refusal(verdict) if verdict.reasons else able}")
        return "\n".join(lines)

    def candidates(self) -> str:
        """Every candidate with its origin, in order: what ranks must have in common to choose alike."""
        return ", ".join(f"{verdict.name} ({verdict.origin})" for verdict in self.verdicts)


def select(spec: AttentionSpec, requested: str, survey: Survey) -> Selection:
    """Choose a backend: `auto` takes the first candidate without reasons, a name is used or refused, never replaced.

    A function of its arguments alone. A plug-in that did not load is a verdict, unless it was asked for: then its
    `PluginError` is raised. Raises `BackendUnavailableError` if the name is unknown or refused, or if no candidate can
    serve.
    """
    verdicts = judge(spec, survey)
    if requested != "auto":
        _check_requested(requested, survey)
    able = [verdict.name for verdict in verdicts if not verdict.reasons]
    wanted = able[:1] if requested == "auto" else [requested]
    if not set(wanted) & set(able):
        raise _refused(requested, verdicts, able)
    return Selection(wanted[0], requested, verdicts)


def judge(spec: AttentionSpec, survey: Survey) -> tuple[Verdict, ...]:
    """A verdict on every candidate, the preferred one for the spec's device first. A function of its arguments."""
    return tuple(
        Verdict(candidate.name, tuple(_reasons(candidate, spec, survey)), candidate.origin)
        for candidate in _in_order(spec.device.type, survey.candidates)
    )


def build(
    selection: Selection,
    spec: AttentionSpec,
    registry: BackendRegistry = BACKENDS,
    *,
    options: BaseModel | None = None,
) -> AttentionBackend:
    """Construct the chosen backend and let it prove itself, before any weight is read.

    `options` are an instance of what the backend declares; `None` stands for its defaults. Raises
    `BackendUnavailableError` if it fails or differs from the reference.
    """
    backend = construct(registry.get(selection.name), spec, options)
    prove(backend, spec)
    return backend


def construct(chosen: type[AttentionBackend], spec: AttentionSpec, options: BaseModel | None) -> AttentionBackend:
    """An unproven backend; whatever its constructor raises is a `BackendUnavailableError`."""
    try:
        if chosen.Options is None:
            return chosen(spec)
        return chosen(spec, chosen.Options() if options is None else options)
    except InferenceShardformerError:
        raise
    except Exception as exc:  # a backend's library may raise anything
        message = f"attention backend {chosen.name!r} could not be constructed: {type(exc).__name__}: {exc}"
        raise BackendUnavailableError(message, remedy=_REPORT_IT) from exc


def _in_order(device_type: str, candidates: tuple[Candidate, ...]) -> list[Candidate]:
    preferred = _PREFERRED.get(device_type, ())

    def rank(candidate: Candidate) -> tuple[bool, int, str]:
        place = preferred.index(candidate.name) if candidate.name in preferred else len(preferred)
        return candidate.name == _LAST, place, candidate.name

    return sorted(candidates, key=rank)


def _reasons(candidate: Candidate, spec: AttentionSpec, survey: Survey) -> list[Reason]:
    if candidate.backend is None:
        error = candidate.error
        return [Reason("plugin", error.message, error.remedy)] if error else []
    reasons = [*candidate.backend.reasons(spec), *_device_reasons(spec, survey)]
    if any(reason.code in _NO_SUCH_DEVICE for reason in reasons):  # then its libraries do not matter
        return reasons
    if candidate.backend.capabilities.needs_native and survey.native is not None:
        reasons.append(survey.native)
    return reasons + [reason for each in candidate.requires if (reason := _library(each, spec, survey))]


def _device_reasons(spec: AttentionSpec, survey: Survey) -> list[Reason]:
    if survey.host.device(spec.device.type, spec.device.index) is not None:
        return []
    message = f"device {spec.device} does not exist on this machine"
    return [Reason("device_missing", message, f"run on a machine where torch sees {spec.device}, or on another device")]


def _library(requirement: Requirement, spec: AttentionSpec, survey: Survey) -> Reason | None:
    """Why a declared library cannot serve: the hardware first, then what its probe found."""
    device = survey.host.device(spec.device.type, spec.device.index)
    problem = requirement.hardware_problem(survey.host, device) if device else None
    if problem:
        return Reason("wrong_device", problem, "run it on such a device, or choose another backend")
    found = survey.probes.get(requirement)
    if found is None:
        return Reason("not_probed", f"{requirement.module} was not probed", "make a survey for this device")
    return None if found.status == "ok" else Reason(found.status, found.detail, found.remedy)


def _check_requested(requested: str, survey: Survey) -> None:
    """Refuse an unknown name, and raise what kept the named one from being loaded."""
    found = next((candidate for candidate in survey.candidates if candidate.name == requested), None)
    if found is None:
        names = [candidate.name for candidate in survey.candidates]
        raise BackendUnavailableError(unknown_name("attention backend", requested, names), remedy=_AUTO_OR_KNOWN)
    if found.error is not None:
        raise found.error


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
