"""The contract of norm kernels."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch

from inference_shardformer.compute.base import ComputeKernel, ComputeKind


class NormKernel(ComputeKernel):
    """Root-mean-square normalisation over the last axis."""

    kind: ClassVar[ComputeKind] = ComputeKind.NORM
    fuses_add: ClassVar[bool] = False  # `add_rms_norm` costs less than its two steps

    @abstractmethod
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, is_offset: bool = False) -> torch.Tensor:
        """`x / sqrt(mean(x^2) + eps) * weight`, the mean in float32; shape and type of `x`.

        As LLaMA rounds it: to the type of `x` before the weight is applied. `is_offset`: as Gemma does, `1 + weight`
        is applied in float32 and the result rounded once.
        """

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, is_offset: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of `residual + x`, and that sum in the type of `x`; changes neither."""
        total = residual + x
        return self.rms_norm(total, weight, eps, is_offset=is_offset), total
