"""Linear layers whose weight is one rank's part. Weights arrive after construction, from a plan."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup


class _ParallelLinear(nn.Module):
    """This rank's `weight [out_features, in_features]` and, if any, `bias [out_features]`; on the meta device first."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device="meta"), requires_grad=False)
        bias_parameter = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False) if bias else None
        self.register_parameter("bias", bias_parameter)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ColumnParallelLinear(_ParallelLinear):
    """Holds a part of the output features; its output stays on the rank. Serves fused projections as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features on this rank]`."""
        return functional.linear(x, self.weight, self.bias)


class RowParallelLinear(_ParallelLinear):
    """Holds a part of the input features; partial sums are added over the group, then the bias once."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, group: TensorParallelGroup) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self._group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features on this rank]` to `[..., out_features]`, equal on every rank."""
        out = self._group.all_reduce(functional.linear(x, self.weight))
        return out if self.bias is None else out + self.bias
