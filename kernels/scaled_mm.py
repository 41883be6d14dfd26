"""Products of e4m3 matrices with a float32 scale for each row of both, by `torch._scaled_mm`.

Nothing here waits for the device. The twin of `quantize_rows` is `quantize_e4m3` in `kernels/reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from inference_shardformer.kernels.e4m3 import E4M3, LARGEST_E4M3, SMALLEST_ROW

QuantizeRows = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""`quantize_rows`, here and in `kernels/triton/fp8_rows.py`."""
WIDTH_UNIT = 16  # both widths of a weight are multiples of it


def quantize_rows(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes `[num_rows, width]` of `[num_rows, size]`, zero behind `size`, and float32 scales `[num_rows, 1]`.

    A row's largest element becomes 448.
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    scales = largest.clamp_min(SMALLEST_ROW).div_(LARGEST_E4M3)
    scaled = x / scales
    missing = width - x.shape[1]
    return (functional.pad(scaled, (0, missing)) if missing else scaled).to(E4M3), scales


def multiply_scaling_rows(
    codes: torch.Tensor,  # e4m3 [num_rows, in_features]
    scales: torch.Tensor,  # float32 [num_rows, 1]
    weight: torch.Tensor,  # e4m3 [out_features, in_features]
    weight_scales: torch.Tensor,  # float32 [1, out_features]
    *,
    bias: torch.Tensor | None = None,  # bfloat16 [out_features]
) -> torch.Tensor:
    """The bfloat16 product in one call that scales rows and columns itself, and adds the bias."""
    return torch._scaled_mm(
        codes, weight.t(), scale_a=scales, scale_b=weight_scales, bias=bias, out_dtype=torch.bfloat16
    )


def multiply_then_scale(
    codes: torch.Tensor,  # as above
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    one: torch.Tensor,  # float32 [], 1.0 on the device
    *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same where torch scales whole matrices alone: the codes' product in float32, then the scales, then the bias.

    Sums of products of codes stay below 448^2 times the depth, far within float32.
    """
    out = torch._scaled_mm(codes, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    out.mul_(scales).mul_(weight_scales)
    return (out if bias is None else out.add_(bias)).to(torch.bfloat16)
