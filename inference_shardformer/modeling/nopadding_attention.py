"""Attention over packed tokens for what LLaMA lacks: norms of heads, partial rotary, learned positions."""

from __future__ import annotations

import torch
from torch import nn

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata
from inference_shardformer.layers.rotary import rotate

PositionEmbeddings = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [1, num_tokens, rotary_dim]


class NoPaddingAttention(nn.Module):
    """Attention of one layer on one rank, without positions of its own: they were added to the embeddings.

    Keeps the signature Hugging Face's decoder layers call; the packed batch arrives as `attn_metadata`.
    """

    def __init__(self, *, layer_idx: int, qkv_proj: nn.Module, o_proj: nn.Module, backend: AttentionBackend) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.qkv_proj = qkv_proj
        self.o_proj = o_proj
        self.backend = backend
        spec = backend.spec
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim

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
        num_tokens = hidden_states.shape[1]
        heads = self.qkv_proj(hidden_states).view(num_tokens, -1, self.head_dim)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q, k = self._placed(q, k, position_embeddings)
        cache, meta = attn_metadata.kv_cache.layer(self.layer_idx), attn_metadata.of(self.layer_idx)
        self.backend.write(k, v, cache, meta)
        out = self.backend.attend(q, cache, meta)  # [num_tokens, num_heads, head_dim]
        return self.o_proj(out.reshape(1, num_tokens, -1)), None

    @property
    def is_sliding(self) -> bool:
        """Whether the layer has a window; the decoder layers of Gemma 3 in transformers 4 ask their attention."""
        return self.backend.spec.sliding_window is not None

    def extra_repr(self) -> str:
        """The bound backend and the head counts of this rank."""
        heads = f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return f"backend={self.backend.name}, {heads}"

    def _placed(
        self, q: torch.Tensor, k: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries `[num_tokens, num_heads, head_dim]` and keys, with their positions."""
        return q.contiguous(), k


class NoPaddingRotaryAttention(NoPaddingAttention):
    """Attention whose rotary embedding turns the first `rotary_dim` elements of every head, or all of them."""

    def _placed(
        self, q: torch.Tensor, k: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if position_embeddings is None:
            raise TypeError(f"layer {self.layer_idx} was given no cos and sin; Hugging Face's layer passes them")
        cos, sin = (part.transpose(0, 1) for part in position_embeddings)  # [num_tokens, 1, rotary_dim]
        return _turn(q, cos, sin), _turn(k, cos, sin)


class NoPaddingNormedAttention(NoPaddingRotaryAttention):
    """Rotary attention whose queries and keys are normalised before, each head by itself."""

    def __init__(
        self,
        *,
        layer_idx: int,
        qkv_proj: nn.Module,
        o_proj: nn.Module,
        q_norm: nn.Module,
        k_norm: nn.Module,
        backend: AttentionBackend,
    ) -> None:
        super().__init__(layer_idx=layer_idx, qkv_proj=qkv_proj, o_proj=o_proj, backend=backend)
        self.q_norm = q_norm
        self.k_norm = k_norm

    def _placed(
        self, q: torch.Tensor, k: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super()._placed(self.q_norm(q), self.k_norm(k), position_embeddings)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotary_dim = cos.shape[-1]
    if rotary_dim == x.shape[-1]:
        return rotate(x, cos, sin)
    return torch.cat((rotate(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), dim=-1)
