"""Survey: every attention backend that is known here, loaded once, with the facts and probes that selection needs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from inference_shardformer.attention.base import AttentionBackend
from inference_shardformer.attention.contract import contract_problem
from inference_shardformer.attention.spec import Reason
from inference_shardformer.errors import PluginError
from inference_shardformer.kernels.cpu.library import native_problem
from inference_shardformer.plugins import Registry
from inference_shardformer.probing.collect import collect_facts
from inference_shardformer.probing.facts import HostFacts
from inference_shardformer.probing.probe import probe_all
from inference_shardformer.probing.requirement import ProbeResult, Requirement

ENTRY_POINT_GROUP = "inference_shardformer.attention_backends"
_OURS = "inference_shardformer."
_REPAIR = "repair or uninstall the distribution that brings it, or choose another name"

BackendRegistry = Registry[type[AttentionBackend]]
Probes = Mapping[Requirement, ProbeResult]


@dataclass(frozen=True)
class Candidate:
    """One registered backend and who brought it. Either `backend` was loaded or `error` says why it was not."""

    name: str
    origin: str
    backend: type[AttentionBackend] | None
    error: PluginError | None = None

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """The foreign libraries it declares."""
        return () if self.backend is None else self.backend.requires


@dataclass(frozen=True)
class Survey:
    """Everything that selection looks at beside the spec: the machine, the candidates, what became of the probes.

    `native` is why there are no native CPU kernels; `None` where there are, or where none could be used.
    """

    host: HostFacts
    candidates: tuple[Candidate, ...]
    probes: Probes
    native: Reason | None = None


def make_registry() -> BackendRegistry:
    """A registry with the built-in backends; installed plug-ins are found when its names are asked for."""
    registry: BackendRegistry = Registry(
        "attention backend", entry_point_group=ENTRY_POINT_GROUP, check=contract_problem
    )
    registry.register("sdpa", "inference_shardformer.attention.sdpa:SdpaAttention")
    registry.register("cpu", "inference_shardformer.attention.cpu:CpuAttention")
    registry.register("flash_attn", "inference_shardformer.attention.flash_attn:FlashAttnAttention")
    registry.register("flash_attn4", "inference_shardformer.attention.flash_attn4:FlashAttn4Attention")
    registry.register("flashinfer", "inference_shardformer.attention.flashinfer:FlashInferAttention")
    registry.register("triton", "inference_shardformer.attention.triton:TritonAttention")
    registry.register("varlen", "inference_shardformer.attention.varlen:VarlenAttention")
    registry.register("reference", "inference_shardformer.attention.reference:ReferenceAttention")
    return registry


BACKENDS = make_registry()


def make_survey(device: torch.device, registry: BackendRegistry = BACKENDS) -> Survey:
    """Load every candidate and probe the libraries they declare, as far as they could work on `device` at all.

    Where no plug-in is installed and nobody declares a library, no process is started.
    """
    host = collect_facts(with_accelerators=device.type != "cpu")
    candidates = load_candidates(registry)
    facts = host.device(device.type, device.index)
    declared = [requirement for candidate in candidates for requirement in candidate.requires]
    wanted = [each for each in declared if facts is not None and each.hardware_problem(host, facts) is None]
    missing = native_problem() if device.type == "cpu" else None
    return Survey(host, candidates, probe_all(wanted), None if missing is None else Reason(*missing))


def load_candidates(registry: BackendRegistry) -> tuple[Candidate, ...]:
    """Every registered backend in order. A plug-in is imported here only after it was in a process of its own."""
    names = registry.names()
    plugins = {name: found for name in names if (found := _as_requirement(registry.import_path(name))) is not None}
    probed = probe_all(plugins.values())
    return tuple(_load(name, registry, probed[plugins[name]] if name in plugins else None) for name in names)


def _load(name: str, registry: BackendRegistry, probed: ProbeResult | None) -> Candidate:
    origin = registry.origin(name)
    if probed is not None and probed.status != "ok":
        message = f"{registry.kind} {name!r} from {origin} failed to load: {probed.detail} [{probed.status}]"
        return Candidate(name, origin, None, PluginError(message, remedy=_REPAIR))
    try:
        return Candidate(name, origin, registry.get(name))
    except PluginError as exc:
        return Candidate(name, origin, None, exc)


def _as_requirement(import_path: str | None) -> Requirement | None:
    """What to probe before a plug-in is imported; nothing for our own backends and for what is imported already."""
    if import_path is None or import_path.startswith(_OURS):
        return None
    module, _, name = import_path.partition(":")
    return None if module in sys.modules else Requirement(module, _REPAIR, names=(name,))
