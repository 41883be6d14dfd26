"""The contract that every compute kernel shares: what it is chosen by, and what it declares about itself."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

import torch

from inference_shardformer.attention.spec import Reason
from inference_shardformer.probing.facts import DeviceFacts, Platform
from inference_shardformer.probing.requirement import Requirement

CONTRACT_VERSION = 1


class ComputeKind(str, Enum):
    """What is computed. For each kind one kernel is chosen for the whole model, in this order."""

    LINEAR = "linear"
    NORM = "norm"
    ROTARY_WRITE = "rotary_write"
    ACTIVATION = "activation"
    EXPERTS = "experts"
    DECODER_LAYER = "decoder_layer"
    SAMPLING = "sampling"


@dataclass(frozen=True)
class ComputeSpec:
    """What the kernels of one rank must serve.

    `quantization` is that of the weights, `None` where they are kept; `compression` what was asked: "lossless", "none",
    or "auto", which leaves it to the linear kernel. `kv_dtype` is the type that keys and values are stored in, `None`
    for that of the computation. `activation` is the name that Hugging Face's configuration gives the
    activation of a gated MLP; empty where the model has none.

    What the policy says of its modules: `layer_shape`, of the decoder layers, "llama" for two norms, attention and a
    gated MLP as there; `rotary`, of attention, "halves" where our modules turn the halves of heads of `head_dim`
    elements; both else empty. `has_experts`: the MLPs are mixtures of experts.

    `chosen` names what was chosen before: the kernels of earlier kinds by the kinds' names, the backends of `attention`
    joined by " + ", and the `all_reduce` ("none" for one rank). `fused_activations` are those that the chosen linear
    kernel applies itself; `norm_adds` says whether the chosen norm kernel adds the residual itself. `own_writes` are
    the attention backends whose `write` does more than store by slot.
    """

    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    intermediate_size: int
    activation: str = ""
    quantization: str | None = None
    compression: str = "auto"
    layer_shape: str = ""
    has_experts: bool = False
    rotary: str = ""
    head_dim: int = 0
    kv_dtype: torch.dtype | None = None
    chosen: Mapping[str, str] = field(default_factory=dict)
    fused_activations: frozenset[str] = frozenset()
    norm_adds: bool = False
    own_writes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ComputeCapabilities:
    """What a kernel serves; every combination of declared values must work. No `platforms` means all of them."""

    devices: tuple[str, ...]  # types of torch.device
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    quantizations: tuple[str, ...] = ()
    compressions: tuple[str, ...] = ()  # beside "none"
    needs_native: bool = False  # the library of native CPU kernels
    platforms: tuple[Platform, ...] = ()
    min_capability: tuple[int, int] | None = None  # of an NVIDIA device


class ComputeKernel(ABC):
    """One kernel of one kind, built once before any weight is read. Declaring it does no work."""

    kind: ClassVar[ComputeKind]
    name: ClassVar[str]
    contract_version: ClassVar[int]
    capabilities: ClassVar[ComputeCapabilities]
    requires: ClassVar[tuple[Requirement, ...]] = ()
    hardware_remedy: ClassVar[str] = "run it on such a device, or choose another kernel"

    def __init__(self, spec: ComputeSpec) -> None:
        self.spec = spec

    @classmethod
    def reasons(cls, spec: ComputeSpec) -> list[Reason]:
        """Every reason why this kernel cannot serve `spec`; an empty list means that it can. Has no side effects."""
        facts, found = cls.capabilities, []
        if spec.device.type not in facts.devices:
            message = f"{cls.name} runs on {' or '.join(facts.devices)}, this is {spec.device.type}"
            found.append(Reason("device", message, f"choose another {cls.kind.value} kernel for this device"))
        if spec.dtype not in facts.dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in facts.dtypes)
            message = f"{cls.name} computes in {known}, not in {str(spec.dtype).removeprefix('torch.')}"
            found.append(Reason("dtype", message, "set inference.dtype to one of them"))
        if cls.kind is ComputeKind.LINEAR and spec.quantization not in (None, *facts.quantizations):
            message = f"{cls.name} does not take weights in {spec.quantization}"
            found.append(Reason("quantization", message, "leave inference.weights.quantization unset"))
        if cls.kind is ComputeKind.LINEAR and spec.compression not in ("auto", "none", *facts.compressions):
            message = f"{cls.name} has no {spec.compression} compression of weights"
            found.append(Reason("compression", message, "set inference.weights.compression=auto"))
        return found + cls.extra_reasons(spec)

    @classmethod
    def extra_reasons(cls, spec: ComputeSpec) -> list[Reason]:
        """What the declared facts cannot express; none by default."""
        return []

    @classmethod
    def required_on(cls, device: torch.device) -> tuple[Requirement, ...]:
        """Those of `requires` that it needs on this type of device; all of them by default."""
        return cls.requires

    @classmethod
    def hardware_problem(cls, device: DeviceFacts) -> str | None:
        """Why it cannot work on this very device, as far as platform and compute capability say; `None` if it can."""
        facts, capability = cls.capabilities, device.capability
        if facts.platforms and device.platform not in facts.platforms:
            return f"{cls.name} works on {' or '.join(facts.platforms)}, this is {device.platform} ({device.name})"
        least = facts.min_capability
        if least is not None and capability is not None and capability < least:
            needed, found = (".".join(map(str, each)) for each in (least, capability))
            return f"{cls.name} needs compute capability {needed}, {device.name} has {found}"
        return None
