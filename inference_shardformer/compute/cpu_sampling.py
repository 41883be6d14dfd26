"""The native sampling kernel."""

from __future__ import annotations

from typing import ClassVar

from inference_shardformer.compute.base import ComputeCapabilities
from inference_shardformer.compute.sampling import Greatest, SamplingKernel
from inference_shardformer.kernels.cpu.search import argmax


class CpuSampling(SamplingKernel):
    """Finds the likeliest token of each row in one native call on all threads. Draws are rarer, and left to torch."""

    name: ClassVar[str] = "cpu"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(devices=("cpu",), needs_native=True)

    def bind(self) -> None:
        """Torch draws."""
        return

    def bind_greatest(self) -> Greatest:
        """The kernel."""
        return argmax
