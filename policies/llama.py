"""LLaMA: grouped-query attention, gated MLP, optional biases, every rope type of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, cast

from torch import nn

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.modeling.nopadding_llama import NoPaddingLlamaAttention, NoPaddingLlamaMLP
from inference_shardformer.policies.base import BuildContext, Policy, PolicyEntry
from inference_shardformer.policies.facts import decoder_facts
from inference_shardformer.policies.rotary import rotary_from_native
from inference_shardformer.policies.rows import column, qkv, replace, replicate, row, vocab_embedding, vocab_head

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class LlamaPolicy(Policy):
    """Shards `LlamaForCausalLM`."""

    architectures: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM",)

    def facts(self, hf_config: PreTrainedConfig) -> ModelFacts:
        """Facts of a LLaMA configuration."""
        return decoder_facts(hf_config, architecture=self.architectures[0])

    def table(self, facts: ModelFacts) -> tuple[PolicyEntry, ...]:
        """Every module of the model, by rows."""
        layer = "model.layers.*"
        return (
            vocab_embedding("model.embed_tokens"),
            replace("model.rotary_emb", native_class="LlamaRotaryEmbedding", build=rotary_from_native),
            replace(f"{layer}.self_attn", native_class="LlamaAttention", build=_attention),
            qkv(f"{layer}.self_attn.qkv_proj", "q_proj", "k_proj", "v_proj"),
            row(f"{layer}.self_attn.o_proj"),
            replace(f"{layer}.mlp", native_class="LlamaMLP", build=_mlp),
            column(f"{layer}.mlp.gate_up_proj", "gate_proj", "up_proj"),
            row(f"{layer}.mlp.down_proj"),
            replicate(f"{layer}.input_layernorm"),
            replicate(f"{layer}.post_attention_layernorm"),
            replicate("model.norm"),
            vocab_head("lm_head", tied_to="model.embed_tokens" if facts.tie_word_embeddings else None),
        )


def _attention(native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
    return NoPaddingLlamaAttention(layer_idx=cast("int", native.layer_idx), backend=context.backend, **children)


def _mlp(native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
    return NoPaddingLlamaMLP(act_fn=cast("nn.Module", native.act_fn), **children)
