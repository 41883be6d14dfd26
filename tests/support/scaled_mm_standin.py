"""A stand-in for `torch._scaled_mm` that refuses what the one for CUDA refuses, and computes in float64.

What it checks is read from aten/src/ATen/native/cuda/Blas.cpp of torch 2.5 and ScaledBlas.cpp of torch 2.13: the
stricter rule of the two where they differ.
"""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn


class Refused(RuntimeError):
    """torch would not take this argument."""


def need(holds: bool, what: str) -> None:
    if not holds:
        raise Refused(what)


def scaled_mm(
    a: torch.Tensor,  # e4m3 [m, k], row-major
    b: torch.Tensor,  # e4m3 [k, n], column-major
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """`(a * scale_a) @ (b * scale_b) + bias`, rounded once."""
    need(a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0], "two matrices that fit")
    need(a.dtype == b.dtype == E4M3, "e4m3")
    need(a.stride() == (a.shape[1], 1), f"a row-major first matrix, not strides {a.stride()}")
    need(b.stride() == (1, b.shape[0]), f"a column-major second matrix, not strides {b.stride()}")
    need(a.shape[0] > 0, "at least one row")
    need(a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0, f"widths that 16 divides, not {a.shape[1]}, {b.shape[1]}")
    need(all(each.data_ptr() % 16 == 0 for each in (a, b)), "matrices aligned to 16 bytes")
    need(scale_a.dtype == scale_b.dtype == torch.float32, "scales in float32")
    need(scale_a.is_contiguous() and scale_b.is_contiguous(), "contiguous scales")
    need(scale_result is None, "no scale of the result, which is not e4m3")
    if scale_a.numel() == scale_b.numel() == 1:
        need(out_dtype in (torch.bfloat16, torch.float16, torch.float32), "a known type of the result")
        need(bias is None or out_dtype != torch.float32, "no bias with a float32 result")
    else:
        need(scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1]), "a scale for each row and column")
        need(out_dtype == torch.bfloat16, "a bfloat16 result where rows have scales")
    if bias is not None:
        need(bias.dtype == torch.bfloat16 and bias.shape == (b.shape[1],) and bias.is_contiguous(), "a bfloat16 bias")
    out = (a.float().double() * scale_a) @ (b.float().double() * scale_b)
    return (out if bias is None else out + bias).to(out_dtype)
