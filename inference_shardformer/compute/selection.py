"""Which kernel of each kind serves a spec, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from inference_shardformer.attention.selector import Selection, Verdict
from inference_shardformer.attention.spec import Reason
from inference_shardformer.compute.base import ComputeKernel, ComputeKind, ComputeSpec
from inference_shardformer.compute.registry import KERNELS, KernelRegistries, KernelRegistry
from inference_shardformer.errors import BackendUnavailableError, PluginError
from inference_shardformer.plugins import unknown_name
from inference_shardformer.probing.collect import collect_facts
from inference_shardformer.probing.facts import HostFacts
from inference_shardformer.probing.probe import probe_all
from inference_shardformer.probing.requirement import ProbeResult, Requirement

# Preferred first, by device type; plug-ins follow in order of their names, what needs nothing is last.
_PREFERRED: Mapping[str, Mapping[ComputeKind, tuple[str, ...]]] = MappingProxyType(
    {
        "cpu": MappingProxyType(
            {
                ComputeKind.LINEAR: ("cpu",),
                ComputeKind.NORM: ("cpu",),
                ComputeKind.ROTARY_WRITE: ("cpu",),
                ComputeKind.ACTIVATION: ("fused",),
                ComputeKind.DECODER_LAYER: ("cpu",),
                ComputeKind.SAMPLING: ("cpu",),
            }
        ),
        "cuda": MappingProxyType(
            {
                ComputeKind.NORM: ("triton",),
                ComputeKind.ROTARY_WRITE: ("triton",),
                ComputeKind.ACTIVATION: ("fused", "triton"),
                ComputeKind.EXPERTS: ("triton",),
                ComputeKind.DECODER_LAYER: ("fused_add",),
                ComputeKind.SAMPLING: ("triton",),
            }
        ),
    }
)
_LAST = ("torch", "modules")


@dataclass(frozen=True)
class KernelCandidate:
    """One registered kernel and who brought it; either `kernel` was loaded or `error` says why it was not."""

    name: str
    origin: str
    kernel: type[ComputeKernel] | None
    error: PluginError | None = None


@dataclass(frozen=True)
class KernelSurvey:
    """Everything that selection looks at beside the spec. `native` is why there are no native kernels, if so.

    Without a `host` the libraries' hardware is not asked for.
    """

    candidates: Mapping[ComputeKind, tuple[KernelCandidate, ...]]
    native: Reason | None
    probes: Mapping[Requirement, ProbeResult]
    host: HostFacts | None = None


def make_kernel_survey(
    native: Reason | None, registries: KernelRegistries = KERNELS, *, device: torch.device | None = None
) -> KernelSurvey:
    """Load every candidate of every kind and probe the libraries they declare, as far as they could work on `device`.

    Without a device, everything that is declared is probed.
    """
    candidates = {
        kind: tuple(_load(name, registries[kind]) for name in registries[kind].names()) for kind in registries
    }
    loaded = [each.kernel for group in candidates.values() for each in group if each.kernel is not None]
    host = None if device is None else collect_facts(with_accelerators=device.type != "cpu")
    wanted = [
        requirement
        for kernel in loaded
        for requirement in kernel.requires
        if device is None or (device.type in kernel.capabilities.devices and not _hardware(requirement, device, host))
    ]
    return KernelSurvey(MappingProxyType(candidates), native, probe_all(wanted), host)


def select_kernel(kind: ComputeKind, spec: ComputeSpec, requested: str, survey: KernelSurvey) -> Selection:
    """Choose one kernel: `auto` takes the first without reasons, a name is used or refused, never replaced.

    A function of its arguments alone. Raises `BackendUnavailableError`, or the `PluginError` of a named plug-in that
    did not load.
    """
    ordered = _in_order(kind, spec.device.type, survey.candidates[kind])
    verdicts = tuple(Verdict(each.name, tuple(_reasons(each, spec, survey)), each.origin) for each in ordered)
    able = [verdict.name for verdict in verdicts if not verdict.reasons]
    if requested == "auto" and able:
        return Selection(able[0], requested, verdicts)
    if requested in able:
        return Selection(requested, requested, verdicts)
    raise _refusal(kind, requested, ordered, verdicts)


def _load(name: str, registry: KernelRegistry) -> KernelCandidate:
    try:
        return KernelCandidate(name, registry.origin(name), registry.get(name))
    except PluginError as exc:
        return KernelCandidate(name, registry.origin(name), None, exc)


def _in_order(
    kind: ComputeKind, device_type: str, candidates: tuple[KernelCandidate, ...]
) -> tuple[KernelCandidate, ...]:
    preferred = _PREFERRED.get(device_type, {}).get(kind, ())

    def rank(candidate: KernelCandidate) -> tuple[bool, int, str]:
        place = preferred.index(candidate.name) if candidate.name in preferred else len(preferred)
        return candidate.name in _LAST, place, candidate.name

    return tuple(sorted(candidates, key=rank))


def _reasons(candidate: KernelCandidate, spec: ComputeSpec, survey: KernelSurvey) -> list[Reason]:
    if candidate.kernel is None:
        error = candidate.error
        return [Reason("plugin", error.message, error.remedy)] if error else []
    reasons = candidate.kernel.reasons(spec)
    if candidate.kernel.capabilities.needs_native and survey.native is not None:
        reasons.append(survey.native)
    if any(reason.code == "device" for reason in reasons):  # then its libraries do not matter
        return reasons
    facts = None if survey.host is None else survey.host.device(spec.device.type, spec.device.index)
    problem = None if facts is None else candidate.kernel.hardware_problem(facts)
    if problem:
        reasons.append(Reason("wrong_device", problem, candidate.kernel.hardware_remedy))
    for each in candidate.kernel.required_on(spec.device):
        problem = _hardware(each, spec.device, survey.host)
        if problem:
            reasons.append(Reason("wrong_device", problem, candidate.kernel.hardware_remedy))
        elif survey.probes[each].status != "ok":
            found = survey.probes[each]
            reasons.append(Reason(found.status, found.detail, found.remedy))
    return reasons


def _hardware(requirement: Requirement, device: torch.device, host: HostFacts | None) -> str | None:
    """Why a library cannot work on the device; `None` if it can, or if nobody knows the device."""
    facts = None if host is None else host.device(device.type, device.index)
    return None if host is None or facts is None else requirement.hardware_problem(host, facts)


def _refusal(
    kind: ComputeKind, requested: str, ordered: tuple[KernelCandidate, ...], verdicts: tuple[Verdict, ...]
) -> BackendUnavailableError | PluginError:
    what, path = f"{kind.value} kernel", f"inference.kernels.{kind.value}"
    known = {verdict.name: verdict for verdict in verdicts}
    if requested != "auto" and requested not in known:
        message = unknown_name(what, requested, list(known))
        return BackendUnavailableError(message, remedy=f"set {path} to auto or to a known name")
    for candidate in ordered:
        if candidate.name == requested and candidate.error is not None:
            return candidate.error
    asked = verdicts if requested == "auto" else (known[requested],)
    reasons = "; ".join(
        f"{verdict.name}: {reason.message} [{reason.code}]" for verdict in asked for reason in verdict.reasons
    )
    remedies = "; ".join(dict.fromkeys(reason.remedy for verdict in asked for reason in verdict.reasons))
    return BackendUnavailableError(f"{what} {requested!r} cannot serve this model: {reasons}", remedy=remedies)
