"""Normalisation, activation and addition on the CPU by native kernels; twins in `kernels/reference.py`.

All take bfloat16, float16 and float32, compute in float32 and round once, unless said otherwise. They know nothing of
autograd; a tensor given as `out` is written and returned.
"""

from __future__ import annotations

import torch

from inference_shardformer.kernels.cpu.arguments import AddArgs, GatedArgs, LayerNormArgs, RmsNormArgs
from inference_shardformer.kernels.cpu.library import NativeKernel
from inference_shardformer.kernels.cpu.rows import check_alike, dtype_of, output, rows_of

_rms_norm = NativeKernel("rms_norm", RmsNormArgs)
_layer_norm = NativeKernel("layer_norm", LayerNormArgs)
_gated = NativeKernel("gated", GatedArgs)
_add = NativeKernel("add", AddArgs)
_SILU, _GELU_TANH = 0, 1


def rms_norm(
    x: torch.Tensor,  # [..., size]
    weight: torch.Tensor,  # [size]
    eps: float,
    *,
    residual: torch.Tensor | None = None,  # [..., size], changed in place
    weight_offset: float = 0.0,
    rounds_before_weight: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + weight_offset)`; with a residual, of `residual += x` instead of `x`.

    `rounds_before_weight` rounds the normalised value to the type of `x` first, as Hugging Face's LLaMA does.
    """
    code, rows = dtype_of("x", x), rows_of("x", x)
    out = output(out, x, x.shape)
    check_alike("weight", weight, x, (rows.size,))
    if residual is not None:
        check_alike("residual", residual, x, x.shape)
    _rms_norm(
        *(out.data_ptr(), x.data_ptr(), None if residual is None else residual.data_ptr(), weight.data_ptr()),
        *(*rows, rows.size, eps, weight_offset, rounds_before_weight, code),
    )
    return out


def layer_norm(
    x: torch.Tensor,  # [..., size]
    weight: torch.Tensor | None,  # [size]
    bias: torch.Tensor | None,  # [size]
    eps: float,
    *,
    residual: torch.Tensor | None = None,  # [..., size], changed in place
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`; with a residual, of `residual += x` instead of `x`."""
    code, rows = dtype_of("x", x), rows_of("x", x)
    out = output(out, x, x.shape)
    for name, each, shape in (
        ("weight", weight, (rows.size,)),
        ("bias", bias, (rows.size,)),
        ("residual", residual, x.shape),
    ):
        if each is not None:
            check_alike(name, each, x, shape)
    pointers = [None if each is None else each.data_ptr() for each in (out, x, residual, weight, bias)]
    _layer_norm(*pointers, *rows, rows.size, eps, code)
    return out


def silu_and_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """`silu(gate) * up` of `[..., 2 * size]`, gate first; returns `[..., size]`."""
    return _gate(gate_up, _SILU, out)


def gelu_and_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """`gelu(gate) * up` of `[..., 2 * size]`, gate first, by gelu's tanh form; returns `[..., size]`."""
    return _gate(gate_up, _GELU_TANH, out)


def add(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """`a + b` of one shape; `out` may be one of them."""
    code = dtype_of("a", a)
    check_alike("a", a, a, a.shape)
    check_alike("b", b, a, a.shape)
    out = output(out, a, a.shape)
    _add(out.data_ptr(), a.data_ptr(), b.data_ptr(), a.numel(), code, 0)
    return out


def _gate(gate_up: torch.Tensor, activation: int, out: torch.Tensor | None) -> torch.Tensor:
    code, rows = dtype_of("gate_up", gate_up), rows_of("gate_up", gate_up)
    if rows.size % 2:
        raise ValueError(f"gate_up has {rows.size} columns; gate and up must be of one size")
    size = rows.size // 2
    out = output(out, gate_up, (*gate_up.shape[:-1], size))
    _gated(out.data_ptr(), gate_up.data_ptr(), rows.num_rows, size, rows.stride, size, activation, code)
    return out
