"""The norm kernel in Triton."""

from __future__ import annotations

from typing import ClassVar

import torch

from inference_shardformer.attention.spec import Reason
from inference_shardformer.compute.base import ComputeCapabilities, ComputeSpec
from inference_shardformer.compute.norm import NormKernel
from inference_shardformer.kernels.triton.requirement import TRITON
from inference_shardformer.probing.requirement import Requirement

_WIDEST = 32768  # columns of a row that one program holds in registers


class TritonNorm(NormKernel):
    """Root-mean-square normalisation in one launch, a row from memory to registers and back."""

    fuses_add: ClassVar[bool] = True
    name: ClassVar[str] = "triton"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(devices=("cuda",))
    requires: ClassVar[tuple[Requirement, ...]] = (Requirement(**TRITON),)

    def __init__(self, spec: ComputeSpec) -> None:
        from inference_shardformer.kernels.triton.norm import add_rms_norm, rms_norm  # they import Triton

        super().__init__(spec)
        self._rms_norm, self._add_rms_norm = rms_norm, add_rms_norm

    @classmethod
    def extra_reasons(cls, spec: ComputeSpec) -> list[Reason]:
        """Rows too wide for the registers of one program."""
        if spec.hidden_size <= _WIDEST:
            return []
        message = f"hidden_size={spec.hidden_size} is above {_WIDEST}, what one program holds in registers"
        return [Reason("hidden_size", message, "choose another norm kernel")]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, is_offset: bool = False) -> torch.Tensor:
        """As LLaMA or Gemma rounds it."""
        offset = 1.0 if is_offset else 0.0
        return self._rms_norm(x, weight, eps, weight_offset=offset, rounds_before_weight=not is_offset)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, is_offset: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both in one launch."""
        offset = 1.0 if is_offset else 0.0
        return self._add_rms_norm(x, residual, weight, eps, weight_offset=offset, rounds_before_weight=not is_offset)
