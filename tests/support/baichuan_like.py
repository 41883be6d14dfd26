"""A local model class with packed weights, as Baichuan-7B has them, registered with transformers' auto classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


class BaichuanConfig(LlamaConfig):
    model_type = "baichuan_like"


class BaichuanAttention(nn.Module):
    """Multi-head attention with one projection for queries, keys and values; computes without a cache."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.W_pack(hidden_states).chunk(3, -1)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class BaichuanForCausalLM(LlamaForCausalLM):
    config_class = BaichuanConfig

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        for layer_idx, layer in enumerate(self.model.layers):
            layer.self_attn = BaichuanAttention(config, layer_idx)


def register() -> None:
    """Let the auto classes know the class; may be called again."""
    AutoConfig.register("baichuan_like", BaichuanConfig, exist_ok=True)
    AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
