"""ComputeKernels: the kernels of one rank, selected, built and proven; what modules are made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from inference_shardformer.attention.selector import Selection
from inference_shardformer.compute.activation import ActivationKernel
from inference_shardformer.compute.base import ComputeKernel, ComputeKind, ComputeSpec
from inference_shardformer.compute.decoder_layer import DecoderLayerKernel
from inference_shardformer.compute.experts import ExpertsKernel
from inference_shardformer.compute.linear import LinearKernel
from inference_shardformer.compute.norm import NormKernel
from inference_shardformer.compute.proof import prove
from inference_shardformer.compute.proof_of_fused import prove_experts, prove_rotary_write, prove_sampling
from inference_shardformer.compute.registry import KERNELS, KernelRegistries
from inference_shardformer.compute.rotary_write import RotaryWriteKernel
from inference_shardformer.compute.sampling import SamplingKernel
from inference_shardformer.errors import BackendUnavailableError, InferenceShardformerError

KernelSelections = Mapping[ComputeKind, Selection]


@dataclass(frozen=True)
class ComputeKernels:
    """One kernel of each kind, bound to modules at their construction."""

    linear: LinearKernel
    norm: NormKernel
    rotary_write: RotaryWriteKernel
    activation: ActivationKernel
    experts: ExpertsKernel
    decoder_layer: DecoderLayerKernel
    sampling: SamplingKernel


def build_kernels(
    selections: KernelSelections, spec: ComputeSpec, registries: KernelRegistries = KERNELS
) -> ComputeKernels:
    """Construct the chosen kernels and let them prove themselves, before any weight is read.

    Raises `BackendUnavailableError` if one cannot be constructed or differs from the reference.
    """
    built = {kind: _construct(registries[kind].get(selections[kind].name), spec) for kind in ComputeKind}
    kernels = ComputeKernels(
        linear=cast("LinearKernel", built[ComputeKind.LINEAR]),
        norm=cast("NormKernel", built[ComputeKind.NORM]),
        rotary_write=cast("RotaryWriteKernel", built[ComputeKind.ROTARY_WRITE]),
        activation=cast("ActivationKernel", built[ComputeKind.ACTIVATION]),
        experts=cast("ExpertsKernel", built[ComputeKind.EXPERTS]),
        decoder_layer=cast("DecoderLayerKernel", built[ComputeKind.DECODER_LAYER]),
        sampling=cast("SamplingKernel", built[ComputeKind.SAMPLING]),
    )
    prove(kernels.linear, kernels.norm, kernels.activation, spec)
    prove_rotary_write(kernels.rotary_write, spec)
    prove_experts(kernels.experts, kernels.linear, spec)
    prove_sampling(kernels.sampling, spec)
    return kernels


def _construct(kernel: type[ComputeKernel], spec: ComputeSpec) -> ComputeKernel:
    try:
        return kernel(spec)
    except InferenceShardformerError:
        raise
    except Exception as exc:  # a plug-in's library may raise anything
        message = f"{kernel.kind.value} kernel {kernel.name!r} could not be constructed: {type(exc).__name__}: {exc}"
        remedy = f"choose another inference.kernels.{kernel.kind.value}, and report this"
        raise BackendUnavailableError(message, remedy=remedy) from exc
