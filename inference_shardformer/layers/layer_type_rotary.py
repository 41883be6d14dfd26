"""Rotary embeddings of a model whose types of layers have frequencies of their own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from inference_shardformer.layers.rotary import RotaryEmbedding


class LayerTypeRotaryEmbedding(nn.Module):
    """One rotary embedding for each type of layer; the call contract of Hugging Face's Gemma 3."""

    def __init__(self, by_layer_type: Mapping[str, RotaryEmbedding]) -> None:
        super().__init__()
        self.by_layer_type = nn.ModuleDict(dict(by_layer_type))

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions `[1, num_tokens]` to cos and sin `[1, num_tokens, head_dim]` for layers of this type."""
        return self.by_layer_type[layer_type](x, position_ids)
