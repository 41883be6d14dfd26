"""The native sampling kernel."""

from __future__ import annotations

from typing import ClassVar

import torch

from inference_shardformer.compute.base import ComputeCapabilities
from inference_shardformer.compute.sampling import Greatest, SamplingKernel
from inference_shardformer.kernels.cpu.search import Found, argmax


class CpuSampling(SamplingKernel):
    """Finds the likeliest token of each row in one native call on all threads. Draws are rarer, and left to torch."""

    name: ClassVar[str] = "cpu"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(devices=("cpu",), needs_native=True)

    def bind(self) -> None:
        """Torch draws."""
        return

    def bind_greatest(self) -> Greatest:
        """The kernel, over results of its own."""
        return _Greatest()


class _Greatest:
    """The native argmax; what it returns is overwritten by the next call."""

    def __init__(self) -> None:
        self._found: Found | None = None

    def __call__(self, rows: torch.Tensor) -> Found:
        if self._found is not None and len(self._found.indices) == len(rows):
            return argmax(rows, out=self._found)
        self._found = argmax(rows)
        return self._found
