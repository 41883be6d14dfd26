"""`act(gate) * up` of a fused projection, in one launch."""

from __future__ import annotations

import torch

from inference_shardformer.kernels.triton.activation_kernel import gated_kernel
from inference_shardformer.kernels.triton.shapes import power_of_two

_BLOCK = 1024


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `[..., 2 * size]`, gate first; returns `[..., size]`."""
    return _gated(gate_up, is_gelu=False)


def gelu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`gelu(gate) * up` of `[..., 2 * size]`, gate first, by gelu's tanh form; returns `[..., size]`."""
    return _gated(gate_up, is_gelu=True)


def _gated(gate_up: torch.Tensor, *, is_gelu: bool) -> torch.Tensor:
    size = gate_up.shape[-1] // 2
    rows = gate_up.reshape(-1, 2 * size)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(_BLOCK, power_of_two(size))
        gated_kernel[(len(rows), -(-size // block))](
            *(out, rows, rows.stride(0)), SIZE=size, BLOCK=block, IS_GELU=is_gelu
        )
    return out
