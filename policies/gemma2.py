"""Gemma 2: soft-capped attention and logits, alternating windows, four norms a layer, scaled embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.policies.base import PolicyEntry
from inference_shardformer.policies.decoder import LlamaShapedPolicy
from inference_shardformer.policies.rows import scaled_vocab_embedding
from inference_shardformer.policies.windows import SlidingWindows, windows_by_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Gemma2Policy(LlamaShapedPolicy):
    """Shards `Gemma2ForCausalLM`. Hugging Face's own forward caps the logits; every rank caps its part."""

    architectures: ClassVar[tuple[str, ...]] = ("Gemma2ForCausalLM",)
    family: ClassVar[str] = "Gemma2"
    norms: ClassVar[tuple[str, ...]] = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    norms_are_offset: ClassVar[bool] = True
    activation: ClassVar[str] = "hidden_activation"
    served: ClassVar[Mapping[str, object]] = MappingProxyType({"use_bidirectional_attention": False})

    def facts(self, hf_config: PreTrainedConfig) -> ModelFacts:
        """Facts of a configuration, with the scale and the cap of its attention scores."""
        return replace(
            super().facts(hf_config),
            attention_scale=float(hf_config.query_pre_attn_scalar) ** -0.5,
            attention_softcap=hf_config.attn_logit_softcapping,
        )

    def sliding_windows(self, hf_config: PreTrainedConfig) -> SlidingWindows:
        """Every other layer has a window, the first among them."""
        return windows_by_pattern(hf_config, every=2)

    def embedding_rows(self, facts: ModelFacts) -> tuple[PolicyEntry, ...]:
        """Embeddings are multiplied by the root of the hidden size."""
        return (scaled_vocab_embedding("model.embed_tokens", scaled_class=f"{self.family}TextScaledWordEmbedding"),)
