"""Rows to e4m3 with a scale for each, in one launch."""

from __future__ import annotations

import torch

from inference_shardformer.kernels.e4m3 import E4M3, LARGEST_E4M3, SMALLEST_ROW
from inference_shardformer.kernels.triton.fp8_rows_kernel import fp8_rows_kernel
from inference_shardformer.kernels.triton.runtime import unit_stride
from inference_shardformer.kernels.triton.shapes import power_of_two

_WIDEST_OF_A_WARP = 512  # columns, so that a thread holds sixteen
_MOST_WARPS = 16


def quantize_rows(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes `[num_rows, width]` of `[num_rows, size]`, zero behind `size`, and float32 scales `[num_rows, 1]`."""
    rows = unit_stride(x)
    codes = torch.empty(len(rows), width, dtype=torch.uint8, device=x.device)
    scales = torch.empty(len(rows), 1, dtype=torch.float32, device=x.device)
    if len(rows):
        padded = power_of_two(width)
        fp8_rows_kernel[(len(rows),)](
            *(codes, scales, rows, rows.stride(0)),
            SIZE=x.shape[1],
            WIDTH=width,
            WIDTH_PAD=padded,
            SMALLEST=SMALLEST_ROW,
            LARGEST=LARGEST_E4M3,
            num_warps=min(max(padded // _WIDEST_OF_A_WARP, 1), _MOST_WARPS),
        )
    return codes.view(E4M3), scales
