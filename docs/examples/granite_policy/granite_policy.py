"""A policy for IBM's Granite: LLaMA with a scale of its own for attention scores."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.modeling.nopadding_llama import NoPaddingLlamaAttention
from inference_shardformer.policies.base import Policy, PolicyEntry
from inference_shardformer.policies.decoder import attention_of, gated_mlp
from inference_shardformer.policies.facts import decoder_facts
from inference_shardformer.policies.rotary import rotary_from_native
from inference_shardformer.policies.rows import gate_up, qkv, replace, replicate, row, vocab_embedding, vocab_head

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class GranitePolicy(Policy):
    """Shards `GraniteForCausalLM`. Its other multipliers stand in code that stays Hugging Face's."""

    name: ClassVar[str] = "granite"
    contract_version: ClassVar[int] = 1
    architectures: ClassVar[tuple[str, ...]] = ("GraniteForCausalLM",)

    def facts(self, hf_config: PreTrainedConfig) -> ModelFacts:
        """Facts of a Granite configuration."""
        facts = decoder_facts(hf_config, architecture=self.architectures[0])
        return dataclasses.replace(facts, attention_scale=float(hf_config.attention_multiplier))

    def table(self, facts: ModelFacts) -> tuple[PolicyEntry, ...]:
        """Every module of the model, by rows."""
        layer = "model.layers.*"
        return (
            vocab_embedding("model.embed_tokens"),
            replace("model.rotary_emb", native_class="GraniteRotaryEmbedding", build=rotary_from_native),
            replace(f"{layer}.self_attn", native_class="GraniteAttention", build=attention_of(NoPaddingLlamaAttention)),
            qkv(f"{layer}.self_attn.qkv_proj", "q_proj", "k_proj", "v_proj"),
            row(f"{layer}.self_attn.o_proj"),
            replace(f"{layer}.mlp", native_class="GraniteMLP", build=gated_mlp),
            gate_up(f"{layer}.mlp.gate_up_proj", "gate_proj", "up_proj"),
            row(f"{layer}.mlp.down_proj"),
            replicate(f"{layer}.input_layernorm"),
            replicate(f"{layer}.post_attention_layernorm"),
            replicate("model.norm"),
            vocab_head("lm_head", tied_to="model.embed_tokens" if facts.tie_word_embeddings else None),
        )
