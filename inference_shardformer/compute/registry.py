"""Which kernels there are of each kind: built in, registered by code, or announced by installed distributions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType

from inference_shardformer.compute.activation import ActivationKernel
from inference_shardformer.compute.base import CONTRACT_VERSION, ComputeCapabilities, ComputeKernel, ComputeKind
from inference_shardformer.compute.decoder_layer import DecoderLayerKernel
from inference_shardformer.compute.experts import ExpertsKernel
from inference_shardformer.compute.linear import LinearKernel
from inference_shardformer.compute.norm import NormKernel
from inference_shardformer.compute.rotary_write import RotaryWriteKernel
from inference_shardformer.compute.sampling import SamplingKernel
from inference_shardformer.plugins import Registry

KernelRegistry = Registry[type[ComputeKernel]]
KernelRegistries = Mapping[ComputeKind, KernelRegistry]

_BASES: Mapping[ComputeKind, type[ComputeKernel]] = MappingProxyType(
    {
        ComputeKind.LINEAR: LinearKernel,
        ComputeKind.NORM: NormKernel,
        ComputeKind.ROTARY_WRITE: RotaryWriteKernel,
        ComputeKind.ACTIVATION: ActivationKernel,
        ComputeKind.EXPERTS: ExpertsKernel,
        ComputeKind.DECODER_LAYER: DecoderLayerKernel,
        ComputeKind.SAMPLING: SamplingKernel,
    }
)
_TORCH = "inference_shardformer.compute.torch_kernels"
_CPU = "inference_shardformer.compute.cpu"
_TRITON = "inference_shardformer.compute.triton"


def make_registries() -> KernelRegistries:
    """A registry for each kind, with the built-in kernels; plug-ins are found when names are asked for."""
    registries = MappingProxyType({kind: _registry(kind) for kind in ComputeKind})
    registries[ComputeKind.LINEAR].register("cpu", f"{_CPU}_linear:CpuLinear")
    registries[ComputeKind.NORM].register("cpu", f"{_CPU}_norm:CpuNorm")
    registries[ComputeKind.ROTARY_WRITE].register("cpu", f"{_CPU}_rotary_write:CpuRotaryWrite")
    registries[ComputeKind.DECODER_LAYER].register("cpu", f"{_CPU}_decoder_layer:CpuDecoderLayer")
    registries[ComputeKind.NORM].register("triton", f"{_TRITON}_norm:TritonNorm")
    registries[ComputeKind.ROTARY_WRITE].register("triton", f"{_TRITON}_rotary_write:TritonRotaryWrite")
    registries[ComputeKind.ACTIVATION].register("triton", f"{_TRITON}_activation:TritonActivation")
    registries[ComputeKind.EXPERTS].register("triton", f"{_TRITON}_experts:TritonExperts")
    registries[ComputeKind.SAMPLING].register("triton", f"{_TRITON}_sampling:TritonSampling")
    registries[ComputeKind.DECODER_LAYER].register(
        "fused_add", "inference_shardformer.compute.fused_add_layer:FusedAddLayer"
    )
    registries[ComputeKind.LINEAR].register("fp8", "inference_shardformer.compute.fp8_linear:Fp8Linear")
    registries[ComputeKind.LINEAR].register("torch", f"{_TORCH}:TorchLinear")
    registries[ComputeKind.NORM].register("torch", f"{_TORCH}:TorchNorm")
    registries[ComputeKind.ROTARY_WRITE].register("torch", f"{_TORCH}:TorchRotaryWrite")
    registries[ComputeKind.ACTIVATION].register("fused", f"{_TORCH}:FusedActivation")
    registries[ComputeKind.ACTIVATION].register("torch", f"{_TORCH}:TorchActivation")
    registries[ComputeKind.EXPERTS].register("torch", f"{_TORCH}:TorchExperts")
    registries[ComputeKind.DECODER_LAYER].register("modules", f"{_TORCH}:ModularLayer")
    registries[ComputeKind.SAMPLING].register("cpu", f"{_CPU}_sampling:CpuSampling")
    registries[ComputeKind.SAMPLING].register("torch", f"{_TORCH}:TorchSampling")
    return registries


def contract_problem(kind: ComputeKind, loaded: object) -> str | None:
    """What keeps an object from being used as a kernel of this kind, in words; `None` if nothing does."""
    base = _BASES[kind]
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        return f"{loaded!r} is not a subclass of {base.__name__}"
    version = getattr(loaded, "contract_version", None)
    if version != CONTRACT_VERSION:
        return f"it is written for contract {version!r}, this is contract {CONTRACT_VERSION}"
    if not isinstance(getattr(loaded, "capabilities", None), ComputeCapabilities):
        return "it declares no capabilities; write capabilities = ComputeCapabilities(...)"
    if inspect.isabstract(loaded):
        return f"it does not implement {', '.join(sorted(loaded.__abstractmethods__))}"
    return None


def _registry(kind: ComputeKind) -> KernelRegistry:
    return Registry(
        f"{kind.value} kernel",
        entry_point_group=f"inference_shardformer.{kind.value}_kernels",
        check=lambda loaded: contract_problem(kind, loaded),
    )


KERNELS = make_registries()
