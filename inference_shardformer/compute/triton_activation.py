"""The activation kernel in Triton."""

from __future__ import annotations

from typing import ClassVar

import torch

from inference_shardformer.attention.spec import Reason
from inference_shardformer.compute.activation import ActivationFunction, ActivationKernel
from inference_shardformer.compute.base import ComputeCapabilities, ComputeSpec
from inference_shardformer.compute.linear import LinearWeight
from inference_shardformer.kernels.triton.requirement import TRITON
from inference_shardformer.probing.requirement import Requirement

# Hugging Face's names of what there are kernels for.
SILU = ("silu", "swish")
GELU = ("gelu_pytorch_tanh", "gelu_new")


class TritonActivation(ActivationKernel):
    """`act(gate) * up` in one launch behind the projection, for silu and for gelu's tanh form."""

    name: ClassVar[str] = "triton"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(devices=("cuda",))
    requires: ClassVar[tuple[Requirement, ...]] = (Requirement(**TRITON),)

    def __init__(self, spec: ComputeSpec) -> None:
        from inference_shardformer.kernels.triton.activation import gelu_and_mul, silu_and_mul  # they import Triton

        super().__init__(spec)
        self._gated = silu_and_mul if spec.activation in SILU else gelu_and_mul

    @classmethod
    def extra_reasons(cls, spec: ComputeSpec) -> list[Reason]:
        """An activation that there is no kernel for."""
        known = (*SILU, *GELU)
        if spec.activation in known:
            return []
        message = f"the activation {spec.activation or '(none)'} is not among {', '.join(known)}"
        return [Reason("activation", message, "choose another activation kernel")]

    def project(
        self, x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None, act_fn: ActivationFunction
    ) -> torch.Tensor:
        """Multiply, then activate and gate in one launch."""
        return self._gated(weight.multiply(x, bias))
