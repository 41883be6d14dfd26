"""Attention over packed tokens for what LLaMA lacks: norms of heads, partial rotary, learned positions."""

from __future__ import annotations

import torch
from torch import nn

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata
from inference_shardformer.compute.rotary_write import RotaryWrite, RotaryWriteKernel
from inference_shardformer.kv_cache.cache import LayerKVCache
from inference_shardformer.modeling.turning import turn_then_write

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
        spec = backend.spec
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.backend = backend

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
        heads = self.qkv_proj(hidden_states).view(num_tokens, -1, self.head_dim)  # queries, then keys, then values
        cache, meta = attn_metadata.kv_cache.layer(self.layer_idx), attn_metadata.of(self.layer_idx)
        q = self._stored(heads, position_embeddings, cache, meta)
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

    def _split(self, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each `[num_tokens, heads of it, head_dim]`."""
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return q, k, v

    def _stored(
        self,
        heads: torch.Tensor,
        position_embeddings: PositionEmbeddings | None,
        cache: LayerKVCache,
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        """Store keys and values, and return queries `[num_tokens, num_heads, head_dim]`, each with its position."""
        q, k, v = self._split(heads)
        self.backend.write(k, v, cache, meta)
        return q.contiguous()


class NoPaddingRotaryAttention(NoPaddingAttention):
    """Attention whose rotary embedding turns the first `rotary_dim` elements of every head, or all of them.

    What turns and stores them is bound at construction, and anew when the attention backend is exchanged.
    """

    _kernel: RotaryWriteKernel | None = None

    @property
    def backend(self) -> AttentionBackend:
        """The attention backend of the layer. Whoever exchanges it binds the rotary kernel anew."""
        return self.__dict__["backend"]

    @backend.setter
    def backend(self, backend: AttentionBackend) -> None:
        self.__dict__["backend"] = backend
        self._bind()

    def turn_by(self, kernel: RotaryWriteKernel) -> None:
        """Let a kernel turn and store heads, as far as it serves the backend; torch and the backend do until then."""
        self._kernel = kernel
        self._bind()

    def extra_repr(self) -> str:
        """As for all attention, and what turns the heads."""
        return f"{super().extra_repr()}, rotary={self._rotary}"

    def _bind(self) -> None:
        fused = None if self._kernel is None else self._kernel.bind(self.backend)
        self._rotary = self._kernel.name if fused and self._kernel else "torch"
        self._turned: RotaryWrite = fused or turn_then_write(self.backend, self.num_heads, self.num_kv_heads)

    def _stored(
        self,
        heads: torch.Tensor,
        position_embeddings: PositionEmbeddings | None,
        cache: LayerKVCache,
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        if position_embeddings is None:
            raise TypeError(f"layer {self.layer_idx} was given no cos and sin; Hugging Face's layer passes them")
        cos, sin = position_embeddings
        return self._turned(heads, cos[0], sin[0], cache, meta)


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

    def _stored(
        self,
        heads: torch.Tensor,
        position_embeddings: PositionEmbeddings | None,
        cache: LayerKVCache,
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        q, k, v = self._split(heads)
        normed = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=1)
        return super()._stored(normed, position_embeddings, cache, meta)
