"""The linear kernel of fp8 weights: e4m3 codes with a scale for each output channel, multiplied by torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import ClassVar

import torch
from torch.nn import functional

from inference_shardformer.attention.spec import Reason
from inference_shardformer.compute.base import ComputeCapabilities, ComputeSpec
from inference_shardformer.compute.linear import LinearKernel, LinearShape, LinearWeight
from inference_shardformer.compute.torch_kernels import PlainWeight
from inference_shardformer.kernels.e4m3 import E4M3
from inference_shardformer.kernels.scaled_mm import (
    WIDTH_UNIT,
    QuantizeRows,
    multiply_scaling_rows,
    multiply_then_scale,
    quantize_rows,
)
from inference_shardformer.kernels.triton.requirement import TRITON
from inference_shardformer.probing.requirement import Requirement

FP8 = "fp8"
Multiply = Callable[..., torch.Tensor]
"""`multiply_scaling_rows` or a function like it."""

# Torch before 2.7 reads scales beyond their end (pytorch/pytorch#133334), and has no such product for 10.x. The
# one for 8.9 ignores the current stream until 2.12 (pytorch/pytorch#177651): a captured step would miss it.
_FIRST_ROW_SCALING = (2, 7)
_ROW_SCALING_CAPABILITIES = ((9, 0), (11, 0))
_WIDEST_BY_TRITON = 32768  # elements of a row that one program holds in registers


class Fp8Weight(LinearWeight):
    """e4m3 codes `[out_features, in_features]` and float32 scales `[1, out_features]`; both widths rounded up to 16.

    Codes of the padding are zero. A row of this rank's slice has one scale, whatever the other ranks hold.
    """

    def __init__(self, shape: LinearShape, multiply: Multiply, quantize: QuantizeRows = quantize_rows) -> None:
        self.shape = shape
        self._multiply = multiply
        self._quantize = quantize
        self._size = _padded(shape.out_features), _padded(shape.in_features)
        self._keep(torch.device("meta"))

    def allocate(self, device: torch.device, *, is_zeroed: bool = False) -> None:
        """Zeroed memory."""
        self._keep(device)

    def write(self, slab: torch.Tensor, *, row: int = 0, column: int = 0) -> None:
        """Round whole rows. Raises `ValueError` for less, since the elements of a row share a scale."""
        rows, columns = slab.shape
        if column or columns != self.shape.in_features:
            raise ValueError(
                f"columns {column} to {column + columns} are not whole rows of {self.shape.in_features}, which share a "
                "scale; write whole rows"
            )
        codes, scales = quantize_rows(slab.to(self._codes.device, self.shape.dtype), self._size[1])
        self._codes[row : row + rows].copy_(codes)
        self._scales[0, row : row + rows].copy_(scales[:, 0])

    def plain(self) -> torch.Tensor:
        """Codes times their scales, in the compute type."""
        wide = self._codes.to(torch.float32) * self._scales.t()
        return wide[: self.shape.out_features, : self.shape.in_features].to(self.shape.dtype)

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Round each row of `x` by a scale of its own, multiply the codes, scale, then add the residual."""
        width, depth = self._size
        tokens = x.reshape(-1, x.shape[-1])
        if bias is not None and len(bias) != width:
            bias = functional.pad(bias, (0, width - len(bias)))
        if len(tokens):
            out = self._multiply(*self._quantize(tokens, depth), self._codes, self._scales, bias=bias)
        else:
            out = tokens.new_empty(0, width)
        if width != self.shape.out_features:
            out = out[:, : self.shape.out_features].contiguous()
        out = out.view(*x.shape[:-1], self.shape.out_features)
        return out if residual is None else residual + out

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """torch's product fuses no activation."""
        raise NotImplementedError("torch's fp8 product fuses no activation; choose an activation kernel not fused")

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """A table is never quantised."""
        raise NotImplementedError("a table is kept as it is: ask for a weight with is_table=True")

    def _keep(self, device: torch.device) -> None:
        width, depth = self._size
        self._codes = torch.zeros(width, depth, dtype=torch.uint8, device=device).view(E4M3)
        self._scales = torch.zeros(1, width, dtype=torch.float32, device=device)
        self.tensors = {"weight": self._codes, "weight_scale": self._scales}


class Fp8Linear(LinearKernel):
    """Weights in e4m3, rounded while loading, and activations in e4m3, rounded for each token when they are used."""

    name: ClassVar[str] = FP8
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[ComputeCapabilities] = ComputeCapabilities(
        devices=("cuda", "cpu"),
        dtypes=(torch.bfloat16,),
        quantizations=(FP8,),
        platforms=("cuda", "cpu"),
        min_capability=(8, 9),
    )
    requires: ClassVar[tuple[Requirement, ...]] = (Requirement(**TRITON),)
    hardware_remedy: ClassVar[str] = "leave inference.weights.quantization unset on this device"

    def __init__(self, spec: ComputeSpec) -> None:
        super().__init__(spec)
        self._multiply: Multiply | None = None
        self._quantize_in_one = None if spec.device.type == "cpu" else _by_triton()

    @classmethod
    def extra_reasons(cls, spec: ComputeSpec) -> list[Reason]:
        """Nobody asked for rounded weights, or torch cannot multiply e4m3 on this CPU."""
        if spec.quantization is None:
            message = f"{FP8} rounds weights to 8 bits, which nobody asked for"
            return [Reason("quantization", message, f"set inference.weights.quantization={FP8}")]
        if spec.device.type == "cpu" and spec.quantization == FP8 and not multiplies_on_cpu():
            message = f"torch {torch.__version__} multiplies no e4m3 matrices on this CPU"
            return [Reason("torch", message, "set inference.weights.quantization=int8, or install a newer torch")]
        return []

    @classmethod
    def required_on(cls, device: torch.device) -> tuple[Requirement, ...]:
        """Triton, but for a CPU: there torch rounds activations, too."""
        return () if device.type == "cpu" else cls.requires

    def weight(self, shape: LinearShape) -> LinearWeight:
        """An empty weight; tables are never quantised."""
        if shape.is_table:
            return PlainWeight(shape)
        if self._multiply is None:
            self._multiply = _multiply_on(self.spec.device)
        is_narrow = shape.in_features <= _WIDEST_BY_TRITON
        return Fp8Weight(shape, self._multiply, (is_narrow and self._quantize_in_one) or quantize_rows)

    def num_bytes(self, shape: LinearShape) -> int:
        """A byte for each code and four for each scale, with the padding; tables as they are."""
        if shape.is_table:
            return shape.out_features * shape.in_features * shape.dtype.itemsize
        width = _padded(shape.out_features)
        return width * _padded(shape.in_features) + width * torch.float32.itemsize


def scales_rows_itself(device: torch.device) -> bool:
    """Whether torch's product applies a scale for each row: elsewhere the scales follow it, in one more pass."""
    if device.type != "cuda":
        return True
    first, end = _ROW_SCALING_CAPABILITIES
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return version >= _FIRST_ROW_SCALING and first <= torch.cuda.get_device_capability(device) < end


@cache
def multiplies_on_cpu() -> bool:
    """Whether this build of torch has the product for CPUs: tried, since no attribute says so."""
    codes, scales = torch.ones(1, WIDTH_UNIT).to(E4M3), torch.ones(1, 1)
    weight, weight_scales = torch.ones(WIDTH_UNIT, WIDTH_UNIT).to(E4M3), torch.ones(1, WIDTH_UNIT)
    try:
        multiply_scaling_rows(codes, scales, weight, weight_scales)
    except RuntimeError:
        return False
    return True


def _by_triton() -> QuantizeRows:
    from inference_shardformer.kernels.triton.fp8_rows import quantize_rows as in_one_launch  # imports Triton

    return in_one_launch


def _multiply_on(device: torch.device) -> Multiply:
    if scales_rows_itself(device):
        return multiply_scaling_rows
    return partial(multiply_then_scale, one=torch.ones((), device=device))


def _padded(size: int) -> int:
    return -(-size // WIDTH_UNIT) * WIDTH_UNIT
