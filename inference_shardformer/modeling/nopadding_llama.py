"""LLaMA's attention and MLP over packed tokens. The backend is bound at construction; `forward` chooses nothing."""

from __future__ import annotations

import torch
from torch import nn

from inference_shardformer.attention.base import AttentionMetadata
from inference_shardformer.layers.rotary import rotate
from inference_shardformer.modeling.nopadding_attention import NoPaddingAttention, PositionEmbeddings


class NoPaddingLlamaAttention(NoPaddingAttention):
    """Attention of one layer on one rank: fused projections, rotary over whole heads, paged cache, bound backend."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        attn_metadata: AttentionMetadata,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """`[1, num_tokens, hidden_size]` in and out, equal on every rank; Hugging Face expects a second value."""
        if position_embeddings is None:
            raise TypeError(f"layer {self.layer_idx} was given no cos and sin; Hugging Face's layer passes them")
        num_tokens = hidden_states.shape[1]
        qkv = self.qkv_proj(hidden_states).view(
            num_tokens, -1, self.head_dim
        )  # [num_tokens, heads + 2 kv_heads, head_dim]
        cos, sin = (part.view(num_tokens, 1, self.head_dim) for part in position_embeddings)
        num_rotated = self.num_heads + self.num_kv_heads
        q, k = rotate(qkv[:, :num_rotated], cos, sin).split((self.num_heads, self.num_kv_heads), dim=1)
        cache, meta = attn_metadata.kv_cache.layer(self.layer_idx), attn_metadata.of(self.layer_idx)
        self.backend.write(k, qkv[:, num_rotated:], cache, meta)
        out = self.backend.attend(q, cache, meta)  # [num_tokens, num_heads, head_dim]
        return self.o_proj(out.reshape(1, num_tokens, -1)), None


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
