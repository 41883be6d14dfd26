"""LlamaShapedPolicy: a decoder like LLaMA, whose table is made from the few facts that a family declares."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, cast

from torch import nn

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.modeling.nopadding_attention import NoPaddingNormedAttention, NoPaddingRotaryAttention
from inference_shardformer.modeling.nopadding_llama import NoPaddingLlamaAttention, NoPaddingLlamaMLP
from inference_shardformer.policies.base import BuildContext, Policy, PolicyEntry, ReplacementFactory
from inference_shardformer.policies.facts import decoder_facts
from inference_shardformer.policies.layers import llama_layer
from inference_shardformer.policies.rotary import rotary_from_native
from inference_shardformer.policies.rows import gate_up, qkv, replace, rms_norm, row, vocab_embedding, vocab_head
from inference_shardformer.policies.served import check_served
from inference_shardformer.policies.windows import SlidingWindows, no_windows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ATTENTION, MLP = "self_attn", "mlp"


class LlamaShapedPolicy(Policy):
    """Shards a decoder of the names and the shape of LLaMA. A family says below what is different.

    `family` begins the names of the native classes: `Mistral` stands for MistralAttention, MistralMLP, MistralRMSNorm
    and MistralRotaryEmbedding. `norms` are those of each layer; `head_norms` those of queries and keys, each head by
    itself; `norms_are_offset`: their weights are stored less one. `activation` and `intermediate_size` name fields.
    `served` are fields that change the maths and are served with this value alone. Biases are kept wherever they are.
    """

    family: ClassVar[str]
    norms: ClassVar[tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm")
    head_norms: ClassVar[tuple[str, ...]] = ()
    norms_are_offset: ClassVar[bool] = False
    rotary: ClassVar[str] = "halves"
    intermediate_size: ClassVar[str] = "intermediate_size"
    activation: ClassVar[str] = "hidden_act"
    served: ClassVar[Mapping[str, object]] = MappingProxyType({})

    def facts(self, hf_config: PreTrainedConfig) -> ModelFacts:
        """Facts of a configuration; raises `UnsupportedModelError` for what the family does not serve."""
        architecture = self.architectures[0]
        check_served(hf_config, architecture, self.served)
        return decoder_facts(
            hf_config,
            architecture=architecture,
            intermediate_size=self.intermediate_size,
            activation=self.activation,
            sliding_windows=self.sliding_windows(hf_config),
        )

    def sliding_windows(self, hf_config: PreTrainedConfig) -> SlidingWindows:
        """The window of each layer. A family without windows refuses a configuration that asks for one."""
        return no_windows(hf_config)

    def table(self, facts: ModelFacts) -> tuple[PolicyEntry, ...]:
        """Every module of the model, by rows."""
        layer, rms = "model.layers.*", f"{self.family}RMSNorm"
        names = (*(f"{layer}.{name}" for name in self.norms), "model.norm")
        return (
            *self.embedding_rows(facts),
            *self.rotary_rows(),
            *self.attention_rows(f"{layer}.{ATTENTION}"),
            *self.mlp_rows(f"{layer}.{MLP}"),
            *(rms_norm(name, native_class=rms, is_offset=self.norms_are_offset) for name in names),
            *self.layer_rows(layer),
            vocab_head("lm_head", tied_to="model.embed_tokens" if facts.tie_word_embeddings else None),
        )

    def layer_rows(self, path: str) -> tuple[PolicyEntry, ...]:
        """The layer as a whole, where it has LLaMA's shape."""
        return (llama_layer(path, native_class=f"{self.family}DecoderLayer"),) if self.layer_shape else ()

    def embedding_rows(self, facts: ModelFacts) -> tuple[PolicyEntry, ...]:
        """The embedding of tokens."""
        return (vocab_embedding("model.embed_tokens"),)

    def rotary_rows(self) -> tuple[PolicyEntry, ...]:
        """The rotary embedding, which all layers share."""
        return (replace("model.rotary_emb", native_class=f"{self.family}RotaryEmbedding", build=rotary_from_native),)

    def attention_rows(self, path: str) -> tuple[PolicyEntry, ...]:
        """The attention of a layer, query, key and value projection fused."""
        rms = f"{self.family}RMSNorm"
        return (
            replace(path, native_class=f"{self.family}Attention", build=self.attention_factory()),
            qkv(f"{path}.qkv_proj", "q_proj", "k_proj", "v_proj"),
            row(f"{path}.o_proj"),
            *(
                rms_norm(f"{path}.{name}", native_class=rms, is_offset=self.norms_are_offset)
                for name in self.head_norms
            ),
        )

    def attention_factory(self) -> ReplacementFactory:
        """What builds the attention of a layer."""
        return attention_of(NoPaddingNormedAttention if self.head_norms else NoPaddingLlamaAttention)

    def mlp_rows(self, path: str) -> tuple[PolicyEntry, ...]:
        """The gated MLP of a layer, gate and up projection fused."""
        return (
            replace(path, native_class=f"{self.family}MLP", build=gated_mlp),
            gate_up(f"{path}.gate_up_proj", "gate_proj", "up_proj"),
            row(f"{path}.down_proj"),
        )


def attention_of(module_class: type[nn.Module]) -> ReplacementFactory:
    """A factory for attention of `module_class`."""

    def build(native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
        layer_idx = cast("int", native.layer_idx)
        module = module_class(layer_idx=layer_idx, backend=context.backend_of(layer_idx), **children)
        if isinstance(module, NoPaddingRotaryAttention):
            module.turn_by(context.kernels.rotary_write)
        return module

    return build


def gated_mlp(native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
    """The gated MLP of a native one, with its own activation."""
    name = "act_fn" if hasattr(native, "act_fn") else "activation_fn"
    return NoPaddingLlamaMLP(act_fn=cast("nn.Module", getattr(native, name)), **children)
