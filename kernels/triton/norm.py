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
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not len(rows):
        return out
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    kept = rows if residual is None else residual.view(-1, size)
    width = power_of_two(size)
    rms_norm_kernel[(len(rows),)](
        *(out, rows, weight.contiguous(), kept, eps, rows.stride(0), kept.stride(0)),
        SIZE=size,
        SIZE_PAD=width,
        WEIGHT_OFFSET=weight_offset,
        ROUNDS_BEFORE_WEIGHT=rounds_before_weight,
        HAS_RESIDUAL=residual is not None,
        num_warps=min(max(width // _WIDEST_OF_A_WARP, 1), _MOST_WARPS),
    )
    return out
