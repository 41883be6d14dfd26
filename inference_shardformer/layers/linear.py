"""Linear layers whose weight is one rank's part. Weights arrive after construction, from a plan."""

from __future__ import annotations

import torch
from torch import nn

from inference_shardformer.compute.activation import ActivationFunction, ActivationKernel
from inference_shardformer.compute.linear import LinearWeight
from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup

_ROWS_COPIED_AT_ONCE = 2048


class WeightHolder(nn.Module):
    """Registers what a `LinearWeight` stores as parameters, and lets others read and write it as plain tensors.

    `stored` is that weight.
    """

    def __init__(self, weight: LinearWeight) -> None:
        super().__init__()
        self.stored = weight
        self._register()

    def allocate_tensor(
        self, leaf: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, is_zeroed: bool
    ) -> None:
        """Give a parameter memory, once; `leaf` is its name in the unsharded module."""
        if leaf == "weight":
            self.stored.allocate(device, is_zeroed=is_zeroed)
            self._register()
        else:
            make = torch.zeros if is_zeroed else torch.empty
            self.register_parameter(leaf, nn.Parameter(make(shape, dtype=dtype, device=device), requires_grad=False))

    def write_tensor(self, leaf: str, slab: torch.Tensor, *, row: int = 0, column: int = 0) -> None:
        """Put values at a place of a parameter, in the shape that the plan gives it."""
        if leaf == "weight":
            self.stored.write(slab, row=row, column=column)
        else:
            self.get_parameter(leaf).detach().narrow(0, row, slab.shape[0]).copy_(slab)

    def settle_tensor(self, leaf: str) -> None:
        """Everything is written to a parameter for now."""
        if leaf == "weight":
            self.stored.settle()

    def weights_loaded(self) -> None:
        """Every parameter of the model is at its place."""
        self.stored.loading_ended()

    def plain_tensor(self, leaf: str) -> torch.Tensor:
        """The values of a parameter in the shape that the plan gives it."""
        return self.stored.plain() if leaf == "weight" else self.get_parameter(leaf).detach()

    def tie_to(self, owner: WeightHolder) -> bool:
        """Use the owner's weight; False, with a copy of its values, if this one stores them in another form."""
        if self.stored.shape == owner.stored.shape:
            self.stored = owner.stored
            for leaf in self.stored.tensors:
                self.register_parameter(leaf, owner.get_parameter(leaf))
            return True
        device = next(iter(owner.stored.tensors.values())).device
        self.stored.allocate(device)
        for row in range(0, self.stored.shape.out_features, _ROWS_COPIED_AT_ONCE):
            end = min(row + _ROWS_COPIED_AT_ONCE, self.stored.shape.out_features)
            self.stored.write(owner.stored.rows(torch.arange(row, end, device=device)), row=row)
        self.stored.settle()
        self._register()
        return False

    def _register(self) -> None:
        for leaf, tensor in self.stored.tensors.items():
            self.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


class ParallelLinear(WeightHolder):
    """This rank's `weight [out_features, in_features]` and, if any, `bias [out_features]`; on the meta device first."""

    bias: nn.Parameter | None

    def __init__(self, weight: LinearWeight, *, bias: bool) -> None:
        super().__init__(weight)
        self.in_features = weight.shape.in_features
        self.out_features = weight.shape.out_features
        held = torch.empty(self.out_features, dtype=weight.shape.dtype, device="meta") if bias else None
        self.register_parameter("bias", None if held is None else nn.Parameter(held, requires_grad=False))

    def extra_repr(self) -> str:
        """The shape on this rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ColumnParallelLinear(ParallelLinear):
    """Holds a part of the output features; its output stays on the rank. Serves fused projections as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features on this rank]`."""
        return self.stored.multiply(x, self.bias)


class GateUpParallelLinear(ParallelLinear):
    """Gate and up projection of this rank in one, gate first, with the activation between them."""

    def __init__(self, weight: LinearWeight, *, bias: bool, activation: ActivationKernel) -> None:
        super().__init__(weight, bias=bias)
        self._activation = activation

    def forward(self, x: torch.Tensor, act_fn: ActivationFunction) -> torch.Tensor:
        """`act_fn(gate) * up`: `[..., in_features]` to `[..., out_features / 2]`."""
        return self._activation.project(x, self.stored, self.bias, act_fn)


class RowParallelLinear(ParallelLinear):
    """Holds a part of the input features; partial sums are added over the group, then the bias once."""

    def __init__(self, weight: LinearWeight, *, bias: bool, group: TensorParallelGroup) -> None:
        super().__init__(weight, bias=bias)
        self._group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features on this rank]` to `[..., out_features]`, equal on every rank."""
        if self._group.size == 1:
            return self.stored.multiply(x, self.bias)
        out = self._group.all_reduce(self.stored.multiply(x))
        return out if self.bias is None else out + self.bias
