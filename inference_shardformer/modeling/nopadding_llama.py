"""LLaMA's attention and MLP over packed tokens. The backend is bound at construction; `forward` chooses nothing."""

from __future__ import annotations

import torch
from torch import nn

from inference_shardformer.modeling.nopadding_attention import NoPaddingRotaryAttention


class NoPaddingLlamaAttention(NoPaddingRotaryAttention):
    """Attention of one layer on one rank: fused projections, rotary over whole heads, paged cache, bound backend."""


class NoPaddingLlamaMLP(nn.Module):
    """Gated MLP of one rank: gate and up fused into one projection."""

    def __init__(self, *, gate_up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]` in and out, equal on every rank."""
        return self.down_proj(self.gate_up_proj(x, self.act_fn))
