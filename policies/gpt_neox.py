"""GPT-NeoX: LayerNorm, partial rotary, biases, query, key and value of each head together, parallel residual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, cast

from torch import nn

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.modeling.nopadding_attention import NoPaddingRotaryAttention
from inference_shardformer.modeling.nopadding_mlp import NoPaddingMLP
from inference_shardformer.policies.base import BuildContext, Policy, PolicyEntry
from inference_shardformer.policies.decoder import attention_of
from inference_shardformer.policies.facts import decoder_facts
from inference_shardformer.policies.rotary import rotary_from_native
from inference_shardformer.policies.rows import (
    column,
    interleaved_qkv,
    replace,
    replicate,
    row,
    vocab_embedding,
    vocab_head,
)
from inference_shardformer.policies.windows import no_windows
from inference_shardformer.sharding.plan import TensorInfo
from inference_shardformer.sharding.stored import StoredTensor, as_it_is

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_STORED_HEAD = "embed_out"  # what checkpoints call the output head, whatever the model does
_STALE_BUFFERS = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")


class GPTNeoXPolicy(Policy):
    """Shards `GPTNeoXForCausalLM`. Hugging Face's own layer adds the residuals, in parallel or one after the other."""

    name: ClassVar[str] = "gpt_neox"
    architectures: ClassVar[tuple[str, ...]] = ("GPTNeoXForCausalLM",)
    rotary: ClassVar[str] = "halves"

    def facts(self, hf_config: PreTrainedConfig) -> ModelFacts:
        """Facts of a configuration."""
        windows = no_windows(hf_config)
        return decoder_facts(hf_config, architecture=self.architectures[0], activation=None, sliding_windows=windows)

    def table(self, facts: ModelFacts) -> tuple[PolicyEntry, ...]:
        """Every module of the model, by rows."""
        layer, embedding = "gpt_neox.layers.*", "gpt_neox.embed_in"
        attention = attention_of(NoPaddingRotaryAttention)
        return (
            vocab_embedding(embedding),
            replace("gpt_neox.rotary_emb", native_class="GPTNeoXRotaryEmbedding", build=rotary_from_native),
            replace(f"{layer}.attention", native_class="GPTNeoXAttention", build=attention),
            interleaved_qkv(f"{layer}.attention.qkv_proj", "query_key_value"),
            row(f"{layer}.attention.o_proj", "dense"),
            replace(f"{layer}.mlp", native_class="GPTNeoXMLP", build=_mlp),
            column(f"{layer}.mlp.up_proj", "dense_h_to_4h"),
            row(f"{layer}.mlp.down_proj", "dense_4h_to_h"),
            replicate(f"{layer}.input_layernorm"),
            replicate(f"{layer}.post_attention_layernorm"),
            replicate("gpt_neox.final_layer_norm"),
            vocab_head(_head(), tied_to=embedding if facts.tie_word_embeddings else None),
        )

    def stored(self, tensors: Mapping[str, TensorInfo]) -> tuple[StoredTensor, ...]:
        """Checkpoints keep the name that the output head had in transformers 4."""
        own = f"{_head()}.weight"
        head = StoredTensor(f"{_STORED_HEAD}.weight", row=own, tensor=own)
        return tuple(head if name == own else as_it_is(name) for name in tensors)

    def optional_tensors(self, facts: ModelFacts) -> frozenset[str]:
        """A tied head, and buffers that old checkpoints carry."""
        layers = [f"gpt_neox.layers.{layer_idx}" for layer_idx in range(facts.num_layers)]
        stale = frozenset(f"{layer}.{name}" for layer in layers for name in _STALE_BUFFERS)
        return stale | {f"{_STORED_HEAD}.weight"} if facts.tie_word_embeddings else stale


def _head() -> str:
    """What the installed transformers calls the output head."""
    from transformers import GPTNeoXForCausalLM

    renamed = "lm_head.weight" in (GPTNeoXForCausalLM._tied_weights_keys or ())
    return "lm_head" if renamed else _STORED_HEAD


def _mlp(native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
    return NoPaddingMLP(act_fn=cast("nn.Module", native.act), **children)
