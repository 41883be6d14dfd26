"""A decoder layer for families whose own layer does not hand keyword arguments on to its attention."""

from __future__ import annotations

import torch
from torch import nn


class NoPaddingPlainLayer(nn.Module):
    """Norm, attention, norm, MLP, each part added to its input; the call contract of layers of transformers 4."""

    def __init__(
        self, *, self_attn: nn.Module, mlp: nn.Module, input_layernorm: nn.Module, post_attention_layernorm: nn.Module
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor]:
        """`[1, num_tokens, hidden_size]` in and out, equal on every rank; transformers 4 expects a tuple."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings=position_embeddings, **kwargs
        )
        hidden_states = hidden_states + attended
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)
