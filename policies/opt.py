"""OPT: learned positions, LayerNorm before each part, biases, an MLP without a gate."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, ClassVar

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.errors import UnsupportedModelError
from inference_shardformer.modeling.nopadding_attention import NoPaddingAttention
from inference_shardformer.policies.base import Policy, PolicyEntry
from inference_shardformer.policies.decoder import attention_of
from inference_shardformer.policies.facts import decoder_facts
from inference_shardformer.policies.rows import column, qkv, replace, replicate, row, vocab_embedding, vocab_head
from inference_shardformer.policies.served import check_served
from inference_shardformer.policies.windows import no_windows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class OPTPolicy(Policy):
    """Shards `OPTForCausalLM`. Hugging Face's own embedding of positions stays, whole on every rank."""

    name: ClassVar[str] = "opt"
    architectures: ClassVar[tuple[str, ...]] = ("OPTForCausalLM",)

    def facts(self, hf_config: PreTrainedConfig) -> ModelFacts:
        """Facts of a configuration; raises `UnsupportedModelError` for projected embeddings and norms at the end."""
        architecture = self.architectures[0]
        served = {
            "word_embed_proj_dim": hf_config.hidden_size,
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
        }
        check_served(hf_config, architecture, served)
        _check_transformers()
        return decoder_facts(
            hf_config,
            architecture=architecture,
            intermediate_size="ffn_dim",
            activation=None,
            sliding_windows=no_windows(hf_config),
        )

    def table(self, facts: ModelFacts) -> tuple[PolicyEntry, ...]:
        """Every module of the model, by rows."""
        decoder = "model.decoder"
        layer = f"{decoder}.layers.*"
        return (
            vocab_embedding(f"{decoder}.embed_tokens"),
            replicate(f"{decoder}.embed_positions"),
            replace(f"{layer}.self_attn", native_class="OPTAttention", build=attention_of(NoPaddingAttention)),
            qkv(f"{layer}.self_attn.qkv_proj", "q_proj", "k_proj", "v_proj"),
            row(f"{layer}.self_attn.o_proj", "out_proj"),
            column(f"{layer}.fc1"),
            row(f"{layer}.fc2"),
            replicate(f"{layer}.self_attn_layer_norm"),
            replicate(f"{layer}.final_layer_norm"),
            replicate(f"{decoder}.final_layer_norm"),
            vocab_head("lm_head", tied_to=f"{decoder}.embed_tokens" if facts.tie_word_embeddings else None),
        )


def _check_transformers() -> None:
    """Refuse a transformers whose OPT does not hand keyword arguments on to its attention."""
    import transformers

    if "logits_to_keep" not in inspect.signature(transformers.OPTForCausalLM.forward).parameters:
        raise UnsupportedModelError(
            f"OPTForCausalLM of transformers {transformers.__version__} does not hand the packed batch to its layers",
            remedy="upgrade transformers",
        )
