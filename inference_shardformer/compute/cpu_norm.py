"""The native norm kernel."""

from __future__ import annotations

from typing import ClassVar

import torch

from inference_shardformer.compute.base import ComputeCapabilities
from inference_shardformer.compute.norm import NormKernel
from inference_shardformer.kernels.cpu.elementwise import rms_norm


class CpuNorm(NormKernel):
    """Root-mean-square normalisation in one native call."""

    name: ClassVar[str] = "cpu"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(devices=("cpu",), needs_native=True)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, is_offset: bool = False) -> torch.Tensor:
        """As LLaMA or Gemma rounds it."""
        return rms_norm(
            x.contiguous(), weight, eps, weight_offset=1.0 if is_offset else 0.0, rounds_before_weight=not is_offset
        )
