"""A linear layer bound once to its weight, so that a call does little besides the kernel."""

from __future__ import annotations

import torch

from inference_shardformer.kernels.cpu.arguments import DTYPES
from inference_shardformer.kernels.cpu.library import native
from inference_shardformer.kernels.cpu.linear import Activation, linear
from inference_shardformer.kernels.cpu.linear_arguments import LinearArgs
from inference_shardformer.kernels.cpu.packed_weight import PackedWeight

_EPILOGUES = {None: 0, "silu": 1, "gelu_tanh": 2}


class BoundLinear:
    """`linear` with everything but `x`, the residual and the output prepared, for a fixed number of threads.

    Serves one caller at a time. `dtype` is the type of `x`; the weight and the bias must stay where they are.
    Raises `ValueError` for what `linear` refuses.
    """

    def __init__(
        self,
        weight: PackedWeight,
        *,
        dtype: torch.dtype,
        bias: torch.Tensor | None = None,
        activation: Activation | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        self.weight, self.bias = weight, bias
        self.dtype, self.out_dtype = dtype, out_dtype or dtype
        empty = torch.empty(0, weight.in_features, dtype=dtype)
        self.width: int = linear(empty, weight, bias=bias, activation=activation, out_dtype=out_dtype).shape[1]
        self._entry = native().entry("linear", LinearArgs)
        self._num_threads = torch.get_num_threads()
        self._args = LinearArgs(
            weight=weight.storage_pointer,
            scales=weight.scales_pointer,
            bias=None if bias is None else bias.data_ptr(),
            n=weight.out_features,
            k=weight.in_features,
            group=weight.group_size,
            weight_dtype=weight.dtype_code,
            activation_dtype=DTYPES[dtype],
            out_dtype=DTYPES[self.out_dtype],
            segments=weight.segments,
            epilogue=_EPILOGUES[activation],
            residual_stride=self.width,
            out_stride=self.width,
        )

    def __call__(
        self,
        x: torch.Tensor,  # [num_rows, in_features], rows of any stride
        residual: torch.Tensor | None = None,  # [num_rows, width], contiguous: changed in place and returned
    ) -> torch.Tensor:
        """`linear(x)`, or `residual += linear(x)`. Raises `ValueError` for tensors that do not fit."""
        num_rows, size = x.shape
        args = self._args
        if size != args.k or x.dtype is not self.dtype or x.stride(1) != 1:
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, strides {x.stride()}; give {self.dtype} [*, {args.k}]")
        if residual is None:
            out = torch.empty((num_rows, self.width), dtype=self.out_dtype)
            args.residual = None
        else:
            out = residual
            if out.shape != (num_rows, self.width) or out.dtype is not self.out_dtype or not out.is_contiguous():
                raise ValueError(f"residual is {out.dtype} {tuple(out.shape)}; give {self.out_dtype} [*, {self.width}]")
            if args.epilogue != 0:
                raise ValueError("residual and activation exclude each other: a gated layer ends no residual branch")
            args.residual = out.data_ptr()
        args.x, args.x_stride, args.m, args.out = x.data_ptr(), x.stride(0), num_rows, out.data_ptr()
        if self._entry(args, self._num_threads) != 0:
            raise MemoryError("the linear kernel found no memory for its workspace")
        return out
