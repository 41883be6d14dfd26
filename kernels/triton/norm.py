"""Root-mean-square normalisation, alone or of `residual += x`, in one launch."""

from __future__ import annotations

import torch

from inference_shardformer.kernels.triton.norm_kernel import rms_norm_kernel
from inference_shardformer.kernels.triton.shapes import power_of_two

_WIDEST_OF_A_WARP = 512  # columns, so that a thread holds sixteen
_MOST_WARPS = 16


def rms_norm(
    x: torch.Tensor,  # [..., size]
    weight: torch.Tensor,  # [size]
    eps: float,
    *,
    residual: torch.Tensor | None = None,  # [..., size], of unit stride in its last axes, changed in place
    weight_offset: float = 0.0,
    rounds_before_weight: bool = False,
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + weight_offset)` over the last axis; shape and type of `x`.

    With a residual, `residual += x` is normalised instead. `rounds_before_weight` rounds the normalised value to the
    type of `x` before it meets the weight, as Hugging Face's LLaMA does.
    """
    kept = None if residual is None else residual.view(-1, x.shape[-1])
    return _run(x, weight, eps, kept, kept, weight_offset, rounds_before_weight)


def add_rms_norm(
    x: torch.Tensor,  # [..., size]
    residual: torch.Tensor,  # [..., size]
    weight: torch.Tensor,  # [size]
    eps: float,
    *,
    weight_offset: float = 0.0,
    rounds_before_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` of `residual + x`, and that sum in the type of `x`; both arguments stay as they are."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, sums = residual.reshape(-1, x.shape[-1]), total.view(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return _run(x, weight, eps, rows, sums, weight_offset, rounds_before_weight), total


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,  # [num_rows, size]
    sums: torch.Tensor | None,  # [num_rows, size], where the sum goes; may be the residual itself
    weight_offset: float,
    rounds_before_weight: bool,
) -> torch.Tensor:
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not len(rows):
        return out
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    before, kept = (rows if each is None else each for each in (residual, sums))
    width = power_of_two(size)
    rms_norm_kernel[(len(rows),)](
        *(out, rows, weight.contiguous(), before, kept, eps, rows.stride(0), before.stride(0), kept.stride(0)),
        SIZE=size,
        SIZE_PAD=width,
        WEIGHT_OFFSET=weight_offset,
        ROUNDS_BEFORE_WEIGHT=rounds_before_weight,
        HAS_RESIDUAL=residual is not None,
        num_warps=min(max(width // _WIDEST_OF_A_WARP, 1), _MOST_WARPS),
    )
    return out
