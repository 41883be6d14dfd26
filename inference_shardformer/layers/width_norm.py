"""RMSNorm over features that are cut over ranks."""

from __future__ import annotations

import torch
from torch import nn

from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup


class WidthRMSNorm(nn.Module):
    """Root-mean-square norm over the features of all ranks together; this rank holds a part of them and of `weight`.

    `total` is the number of features of the whole model, `num_copies` on how many ranks each of them lies.
    """

    def __init__(self, size: int, *, total: int, num_copies: int, eps: float, group: TensorParallelGroup) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta"), requires_grad=False)
        self.eps = eps
        self._total = total
        self._num_copies = num_copies
        self._group = group

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., size]` in and out."""
        x = hidden_states.float()
        squares = self._group.all_reduce(x.pow(2).sum(dim=-1, keepdim=True) / self._num_copies)
        scale = torch.rsqrt(squares / self._total + self.eps)
        return (self.weight * (x * scale)).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Features here and in all."""
        return f"{self.weight.shape[0]} of {self._total}, eps={self.eps}"
