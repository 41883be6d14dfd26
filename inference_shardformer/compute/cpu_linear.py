"""The native linear kernel: packed weights, fused activations, int8."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch

from inference_shardformer.compute.base import ComputeCapabilities, ComputeSpec
from inference_shardformer.compute.linear import LinearKernel, LinearShape, LinearWeight
from inference_shardformer.kernels.cpu.linear import Activation, embedding, linear
from inference_shardformer.kernels.cpu.packed_weight import PackedWeight, WeightArena, empty_weight, num_bytes_of

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
)


class PackedLinearWeight(LinearWeight):
    """A weight in the order in which the kernels read it; there is no plain copy."""

    def __init__(
        self, shape: LinearShape, *, packed_dtype: torch.dtype, activation: Activation | None, arena: WeightArena
    ) -> None:
        self.shape = shape
        self._packed_dtype = packed_dtype
        self._activation = activation
        self._arena = arena
        self._packed: PackedWeight | None = None
        self.tensors = {"weight": torch.empty(0, dtype=torch.uint8, device="meta")}

    @property
    def packed(self) -> PackedWeight:
        """The packed weight. Raises `RuntimeError` before it was allocated."""
        if self._packed is None:
            raise RuntimeError(f"a weight of shape {self.shape} is used before it was allocated")
        return self._packed

    def allocate(self, device: torch.device, *, is_zeroed: bool = False) -> None:
        """Packed memory, which is always zeroed."""
        shape = self.shape
        self._packed = empty_weight(
            shape.out_features,
            shape.in_features,
            dtype=self._packed_dtype,
            segments=2 if shape.is_gated else 1,
            arena=self._arena,
        )
        self.tensors = {"weight": self._packed.storage}
        if self._packed.scales is not None:
            self.tensors["weight_scale"] = self._packed.scales

    def write(self, slab: torch.Tensor, *, row: int = 0, column: int = 0) -> None:
        """Pack, or quantise and pack, into the same memory."""
        self.packed.write(slab.to(self.shape.dtype), row=row, column=column)

    def plain(self) -> torch.Tensor:
        """Unpack, bit for bit; int8 codes times their scales."""
        return self.packed.read(dtype=self.shape.dtype)

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One native call; summed in float32 and rounded once."""
        return linear(x, self.packed, bias=bias, residual=residual)

    def multiply_wide(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Sums as they are, without rounding."""
        return linear(x, self.packed, bias=bias, out_dtype=torch.float32)

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """One native call, with the model's activation in it."""
        return linear(x, self.packed, bias=bias, activation=self._activation)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows gathered from the packed weight."""
        return embedding(ids.contiguous(), self.packed)


class CpuLinear(LinearKernel):
    """Native linear layers over weights that are packed once while loading."""

    name: ClassVar[str] = "cpu"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(
        devices=("cpu",), quantizations=("int8",), needs_native=True
    )
    fused_activations: ClassVar[frozenset[str]] = frozenset(ACTIVATIONS)

    def __init__(self, spec: ComputeSpec) -> None:
        super().__init__(spec)
        self._arena = WeightArena()

    def weight(self, shape: LinearShape) -> PackedLinearWeight:
        """An empty weight; tables are never quantised."""
        return PackedLinearWeight(
            shape,
            packed_dtype=self._packed_dtype(shape),
            activation=ACTIVATIONS.get(self.spec.activation) if shape.is_gated else None,
            arena=self._arena,
        )

    def num_bytes(self, shape: LinearShape) -> int:
        """Packed elements with their padding, and scales."""
        segments = 2 if shape.is_gated else 1
        return num_bytes_of(shape.out_features, shape.in_features, dtype=self._packed_dtype(shape), segments=segments)

    def _packed_dtype(self, shape: LinearShape) -> torch.dtype:
        return torch.int8 if self.spec.quantization == "int8" and not shape.is_table else shape.dtype
