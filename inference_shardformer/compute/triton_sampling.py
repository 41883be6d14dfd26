"""The sampling kernel in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from inference_shardformer.compute.base import ComputeCapabilities, ComputeSpec
from inference_shardformer.compute.sampling import Draw, SamplingKernel
from inference_shardformer.kernels.triton.requirement import TRITON
from inference_shardformer.probing.requirement import Requirement


class TritonSampling(SamplingKernel):
    """Temperature, top-k, top-p and the draw of all rows in one launch, without a sort.

    Probabilities are added up in float64. A number that comes to lie within the rounding of float32 beside the border
    of two tokens may draw the other one of them than torch does.
    """

    name: ClassVar[str] = "triton"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(devices=("cuda",))
    requires: ClassVar[tuple[Requirement, ...]] = (Requirement(**TRITON),)

    def __init__(self, spec: ComputeSpec) -> None:
        from inference_shardformer.kernels.triton.sampling import sample  # imports Triton

        super().__init__(spec)
        self._sample = sample

    def bind(self) -> Draw:
        """The kernel."""
        return self.draw

    def draw(
        self,
        logits: torch.Tensor,
        *,
        temperatures: Sequence[float],
        top_ks: Sequence[int],
        top_ps: Sequence[float],
        uniforms: Sequence[float],
    ) -> torch.Tensor:
        """As the contract says; all settings reach the device in one copy, which waits for nothing."""
        host = torch.tensor([temperatures, top_ks, top_ps, uniforms], dtype=torch.float64)
        given = host if logits.device.type == "cpu" else host.pin_memory().to(logits.device, non_blocking=True)
        return self._sample(logits, temperatures=given[0], top_ks=given[1], top_ps=given[2], uniforms=given[3])
