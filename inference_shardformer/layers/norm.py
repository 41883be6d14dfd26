"""RMSNorm with a kernel that was bound at construction."""

from __future__ import annotations

import torch
from torch import nn

from inference_shardformer.compute.norm import NormKernel


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis; `weight` arrives from the plan.

    `is_offset`: the stored weight is the difference to one, as in Gemma.
    """

    def __init__(self, size: int, *, eps: float, kernel: NormKernel, is_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta"), requires_grad=False)
        self.eps = eps
        self.is_offset = is_offset
        self._kernel = kernel

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., size]` in and out."""
        return self._kernel.rms_norm(hidden_states, self.weight, self.eps, is_offset=self.is_offset)

    def of_sum(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of `residual + hidden_states`, and that sum.

        While somebody's hooks watch this module it is called with the sum, so that they see what they would elsewhere.
        """
        if self._forward_hooks or self._forward_pre_hooks:
            total = residual + hidden_states
            return self(total), total
        return self._kernel.add_rms_norm(hidden_states, residual, self.weight, self.eps, is_offset=self.is_offset)

    def extra_repr(self) -> str:
        """Size, eps and the bound kernel."""
        return f"{self.weight.shape[0]}, eps={self.eps}, kernel={self._kernel.name}"
