"""Linear layers and embeddings on the CPU over packed weights; twins in `kernels/reference.py`.

Sums are in float32 and rounded once, after bias, gate and residual; the result of a row depends neither on the other
rows nor on the number of threads. With int8 weights a row of `x` is quantised too, to 15 bits of its largest element:
the sums are then exact integers.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from inference_shardformer.kernels.cpu.arguments import DTYPES
from inference_shardformer.kernels.cpu.library import NativeKernel
from inference_shardformer.kernels.cpu.linear_arguments import LinearArgs, PackedEmbeddingArgs
from inference_shardformer.kernels.cpu.packed_weight import PackedWeight
from inference_shardformer.kernels.cpu.rows import check_alike, dtype_of, rows_of

_linear = NativeKernel("linear", LinearArgs)
_embedding = NativeKernel("packed_embedding", PackedEmbeddingArgs)

Activation = Literal["silu", "gelu_tanh"]
_EPILOGUES = {None: 0, "silu": 1, "gelu_tanh": 2}


class Norm(NamedTuple):
    """A root-mean-square normalisation of the rows of `x`, done while they are read."""

    weight: torch.Tensor  # [in_features]
    eps: float
    weight_offset: float = 0.0
    rounds_before_weight: bool = False


def linear(
    x: torch.Tensor,  # [..., in_features]
    weight: PackedWeight,
    *,
    bias: torch.Tensor | None = None,  # [out_features]
    residual: torch.Tensor | None = None,  # like the result, which may be the same tensor
    activation: Activation | None = None,
    norm: Norm | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`x @ weight^T + bias + residual`; with an activation, `activation(gate) * up` of half as many columns.

    `out_dtype` may be float32, for logits. Raises `ValueError` for tensors that do not fit the weight.
    """
    code, rows = dtype_of("x", x), rows_of("x", x)
    _check_x(x, weight)
    width = weight.out_features if activation is None else _gated_width(weight, activation)
    shape = (*x.shape[:-1], width)
    out = x.new_empty(shape, dtype=out_dtype or x.dtype) if out is None else out
    out_rows = _checked_rows("out", out, shape, (x.dtype, torch.float32))
    residual_stride = 0
    if bias is not None:
        check_alike("bias", bias, x, (weight.out_features,))
    if residual is not None:
        residual_stride = _checked_rows("residual", residual, shape, (out.dtype,))
        if activation is not None:
            raise ValueError("residual and activation exclude each other: a gated layer ends no residual branch")
    if norm is not None:
        check_alike("norm.weight", norm.weight, x, (weight.in_features,))
    _linear(
        *(x.data_ptr(), weight.storage_pointer, weight.scales_pointer, _pointer(bias), _pointer(residual)),
        *(out.data_ptr(), None, None if norm is None else norm.weight.data_ptr()),
        *(rows.num_rows, weight.out_features, weight.in_features, rows.stride, residual_stride, out_rows),
        *(weight.group_size, weight.dtype_code, code, DTYPES[out.dtype], weight.segments, _EPILOGUES[activation]),
        *((False, 0.0, 0.0) if norm is None else (norm.rounds_before_weight, norm.eps, norm.weight_offset)),
    )
    return out


def embedding(
    ids: torch.Tensor,  # int64 [...]
    weight: PackedWeight,
    *,
    first: int = 0,
) -> torch.Tensor:
    """Rows of a packed weight by token id, `[..., in_features]`: a head's weight serves a tied embedding.

    The weight holds the ids from `first` on; an id that it does not hold gives zeros, which the ranks of a sharded
    vocabulary add up. Raises `ValueError` for int8 weights, for two segments, and for ids of another type.
    """
    if weight.dtype == torch.int8 or weight.segments != 1:
        raise ValueError(f"a weight of {weight.dtype} in {weight.segments} segments is no embedding; pack it plain")
    if ids.dtype != torch.int64 or not (ids.is_cpu and ids.is_contiguous()):
        raise ValueError(f"ids are {ids.dtype} on {ids.device} with strides {ids.stride()}; give contiguous int64")
    out = torch.empty(*ids.shape, weight.in_features, dtype=weight.dtype)
    _embedding(
        *(weight.storage_pointer, ids.data_ptr(), out.data_ptr(), ids.numel(), weight.out_features),
        *(weight.in_features, weight.in_features, first, weight.dtype_code),
    )
    return out


def _pointer(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _check_x(x: torch.Tensor, weight: PackedWeight) -> None:
    if x.shape[-1] != weight.in_features or (x.dtype != weight.dtype and weight.dtype != torch.int8):
        raise ValueError(
            f"x of {x.dtype} {tuple(x.shape)} does not fit a weight of {weight.dtype} "
            f"({weight.out_features}, {weight.in_features})"
        )


def _gated_width(weight: PackedWeight, activation: Activation) -> int:
    if activation not in _EPILOGUES or weight.segments != 2:
        raise ValueError(
            f"activation={activation!r} over {weight.segments} segments; choose 'silu' or 'gelu_tanh' and pack gate "
            "and up as two segments"
        )
    return weight.out_features // 2


def _checked_rows(name: str, t: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> int:
    """The distance of the rows of a tensor that must have that shape and one of those types."""
    if tuple(t.shape) != shape or t.dtype not in dtypes or not t.is_cpu:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} is {t.dtype} {tuple(t.shape)} on {t.device}; it must be {wanted} {shape} on the CPU")
    return rows_of(name, t).stride
