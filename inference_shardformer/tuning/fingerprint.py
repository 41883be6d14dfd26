"""Fingerprint: what a measurement depends on and may change from one day to the next, as plain text by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version

from pydantic import BaseModel, ValidationError

from inference_shardformer.attention.base import AttentionSpec
from inference_shardformer.attention.survey import Survey
from inference_shardformer.config.plugin_options import without_version

Fingerprint = Mapping[str, str]
Options = Mapping[str, Mapping[str, object]]  # by the name of a backend
_ABSENT = "absent"


def fingerprint_of(survey: Survey, spec: AttentionSpec, options: Options) -> dict[str, str]:
    """The device, the processor, the versions, and every known backend with its origin, libraries and options.

    `options` are those that were asked for; what a backend declares beside them counts with its default.
    """
    cpu = survey.host.cpu
    device = survey.host.device(spec.device.type, spec.device.index)
    facts = {
        "device": _ABSENT if device is None else f"{device.platform} {device.name} {device.memory_bytes or ''}".strip(),
        "processor": " ".join((cpu.architecture, cpu.name, *cpu.isa)),
        "torch": survey.host.torch,
        "triton": survey.host.triton or _ABSENT,
        "inference-shardformer": _own_version(),
    }
    for candidate in survey.candidates:
        libraries = [
            f"{found.name} {found.status} {found.version}".strip()
            for requirement in candidate.requires
            if (found := survey.probes.get(requirement)) is not None
        ]
        loaded = [] if candidate.error is None else ["failed to load"]
        facts[f"backend {candidate.name}"] = "; ".join([candidate.origin, *loaded, *libraries])
        if candidate.backend is not None and candidate.backend.Options is not None:
            facts[f"options of {candidate.name}"] = _options(candidate.backend.Options, options.get(candidate.name, {}))
    return facts


def differences(measured: Fingerprint, present: Fingerprint) -> list[str]:
    """What is not the same, in words, by name."""
    return [
        f"{name}: measured with {measured.get(name, _ABSENT)}, now {present.get(name, _ABSENT)}"
        for name in dict.fromkeys((*measured, *present))
        if measured.get(name, _ABSENT) != present.get(name, _ABSENT)
    ]


def spec_key(spec: AttentionSpec) -> str:
    """The shapes and types that a choice holds for, as text; the device's type stands in it, not its number."""
    parts = {each.name: getattr(spec, each.name) for each in fields(spec) if each.name != "features"}
    parts |= {"device": spec.device.type, "features": "+".join(sorted(feature.value for feature in spec.features))}
    shown = {name: str(value).removeprefix("torch.") for name, value in parts.items() if value not in (None, False)}
    return " ".join(f"{name}={value}" for name, value in shown.items())


def _options(declared: type[BaseModel], given: Mapping[str, object]) -> str:
    """Every option with its value; as given where that is not valid, which is refused elsewhere."""
    try:
        values = declared.model_validate(without_version(given)).model_dump(mode="json")
    except ValidationError:
        return f"not valid: {json.dumps(dict(given), sort_keys=True, default=str)}"
    return json.dumps(values, sort_keys=True)


def _own_version() -> str:
    try:
        return version("inference-shardformer")
    except PackageNotFoundError:
        return _ABSENT
