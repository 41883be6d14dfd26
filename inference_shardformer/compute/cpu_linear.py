"""The native linear kernel: packed weights, fused activations, int8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import ClassVar, Literal

import torch

from inference_shardformer.attention.spec import Reason
from inference_shardformer.compute.base import ComputeCapabilities, ComputeSpec
from inference_shardformer.compute.linear import Compression, LinearKernel, LinearShape, LinearWeight
from inference_shardformer.errors import CapacityError
from inference_shardformer.kernels.cpu.compact_weight import (
    LARGEST_DEPTH,
    compression_gains,
    empty_compact_weight,
    num_compact_bytes,
)
from inference_shardformer.kernels.cpu.library import native, native_problem
from inference_shardformer.kernels.cpu.linear import Activation, embedding, linear
from inference_shardformer.kernels.cpu.packed_weight import PackedWeight, WeightArena, empty_weight, num_bytes_of

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
)
LOSSLESS: Literal["lossless"] = "lossless"


class PackedLinearWeight(LinearWeight):
    """A weight in the order in which the kernels read it; there is no plain copy."""

    def __init__(
        self,
        shape: LinearShape,
        *,
        packed_dtype: torch.dtype,
        is_compact: bool,
        activation: Activation | None,
        arena: WeightArena,
    ) -> None:
        self.shape = shape
        self._packed_dtype = packed_dtype
        self._is_compact = is_compact
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
        """Packed memory, which is always zeroed. Raises `CapacityError`."""
        size = self.shape.out_features, self.shape.in_features
        segments, arena = _segments(self.shape), self._arena
        with _memory_for(self.shape):
            if self._is_compact:
                self._packed = empty_compact_weight(*size, segments=segments, is_filled=not is_zeroed, arena=arena)
            else:
                self._packed = empty_weight(*size, dtype=self._packed_dtype, segments=segments, arena=arena)
        self.tensors = {"weight": self._packed.storage}
        if self._packed.scales is not None:
            self.tensors["weight_scale"] = self._packed.scales

    def write(self, slab: torch.Tensor, *, row: int = 0, column: int = 0) -> None:
        """Pack, or quantise and pack, into the same memory. Raises `CapacityError`, as `settle` does."""
        with _memory_for(self.shape):
            self.packed.write(slab.to(self.shape.dtype), row=row, column=column)

    def settle(self) -> None:
        """Compress what is to be compressed."""
        with _memory_for(self.shape):
            self.packed.settle()

    def loading_ended(self) -> None:
        """Give up the memory in which weights are packed before they are compressed."""
        self._arena.keep_nothing()

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
        devices=("cpu",), quantizations=("int8",), compressions=(LOSSLESS,), needs_native=True
    )
    fused_activations: ClassVar[frozenset[str]] = frozenset(ACTIVATIONS)

    def __init__(self, spec: ComputeSpec) -> None:
        super().__init__(spec)
        self._arena = WeightArena()

    @classmethod
    def extra_reasons(cls, spec: ComputeSpec) -> list[Reason]:
        """Weights that were asked for compressed cannot be."""
        if spec.compression != LOSSLESS or spec.device.type not in cls.capabilities.devices:
            return []
        problem = _uncompressed(spec, spec.dtype, spec.hidden_size)
        return [] if problem is None else [problem]

    @classmethod
    def compression(cls, spec: ComputeSpec) -> Compression:
        """bfloat16 in 12 bits, where this machine gains by it, or where that is asked for."""
        if spec.compression == "none":
            return Compression("none", "as asked")
        problem = _uncompressed(spec, spec.dtype, spec.hidden_size)
        if problem is not None:
            return Compression("none", problem.message)
        return Compression(LOSSLESS, "bfloat16 weights are kept in 12 bits each, and read back bit for bit")

    def weight(self, shape: LinearShape) -> PackedLinearWeight:
        """An empty weight; tables are never quantised."""
        return PackedLinearWeight(
            shape,
            packed_dtype=self._packed_dtype(shape),
            is_compact=self._is_compact(shape),
            activation=ACTIVATIONS.get(self.spec.activation) if shape.is_gated else None,
            arena=self._arena,
        )

    def num_bytes(self, shape: LinearShape) -> int:
        """Packed elements with their padding, and scales."""
        size, segments = (shape.out_features, shape.in_features), _segments(shape)
        if self._is_compact(shape):
            return num_compact_bytes(*size, segments=segments)
        return num_bytes_of(*size, dtype=self._packed_dtype(shape), segments=segments)

    def _packed_dtype(self, shape: LinearShape) -> torch.dtype:
        return torch.int8 if self.spec.quantization == "int8" and not shape.is_table else shape.dtype

    def _is_compact(self, shape: LinearShape) -> bool:
        return compresses(self.spec, self._packed_dtype(shape), shape.in_features)


@contextmanager
def _memory_for(shape: LinearShape) -> Iterator[None]:
    """Names the weight that there is no memory for."""
    try:
        yield
    except MemoryError as exc:
        raise CapacityError(
            f"this rank has no memory for a weight of {shape.out_features} x {shape.in_features}: {exc}",
            remedy="free memory on this machine, or share the model out over more ranks",
        ) from exc


def _segments(shape: LinearShape) -> int:
    return 2 if shape.is_gated else 1


def compresses(spec: ComputeSpec, shape_dtype: torch.dtype, in_features: int = 1) -> bool:
    """Whether a weight stored in this type is kept compressed. Asked where there are native kernels alone."""
    return spec.compression != "none" and _uncompressed(spec, shape_dtype, in_features) is None


def _uncompressed(spec: ComputeSpec, dtype: torch.dtype, in_features: int = 1) -> Reason | None:
    """Why weights of this type are not compressed; `None` if they can be, as far as the native kernels are there."""
    unset = "leave inference.weights.compression unset"
    if spec.quantization is not None:
        message = f"weights in {spec.quantization} are not compressed any further"
        return Reason("compression", message, f"{unset}, or inference.weights.quantization")
    if dtype != torch.bfloat16:
        message = f"weights in {str(dtype).removeprefix('torch.')} are not compressed, only those in bfloat16"
        return Reason("compression", message, f"{unset}, or set inference.dtype=bf16")
    if in_features > LARGEST_DEPTH:
        message = f"a weight of {in_features} columns is not compressed, only one of at most {LARGEST_DEPTH}"
        return Reason("compression", message, unset)
    if spec.compression != LOSSLESS and native_problem() is None and not compression_gains():
        message = f"the instruction-set level {native().isa_level} gains nothing by compressed weights"
        return Reason("compression", message, "set inference.weights.compression=lossless to have them all the same")
    return None
