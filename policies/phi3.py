"""Phi-3: LLaMA whose checkpoints keep query, key and value, and gate and up, in one tensor each; partial rotary."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.modeling.nopadding_attention import NoPaddingRotaryAttention
from inference_shardformer.policies.base import PolicyEntry
from inference_shardformer.policies.decoder import LlamaShapedPolicy, attention_of, gated_mlp
from inference_shardformer.policies.rows import packed_gate_up, packed_qkv, row
from inference_shardformer.policies.rows import replace as replace_row
from inference_shardformer.policies.windows import SlidingWindows, same_window_everywhere

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Phi3Policy(LlamaShapedPolicy):
    """Shards `Phi3ForCausalLM`."""

    architectures: ClassVar[tuple[str, ...]] = ("Phi3ForCausalLM",)
    family: ClassVar[str] = "Phi3"
    can_capture: ClassVar[bool] = True

    def facts(self, hf_config: PreTrainedConfig) -> ModelFacts:
        """Facts of a configuration. Under longrope a sequence is encoded anew when it outgrows the original length."""
        facts = super().facts(hf_config)
        length = int(hf_config.original_max_position_embeddings) if facts.length_dependent_rope else None
        return replace(facts, rope_switch_length=length)

    def sliding_windows(self, hf_config: PreTrainedConfig) -> SlidingWindows:
        """`sliding_window` tokens in every layer, or none."""
        return same_window_everywhere(hf_config)

    def attention_rows(self, path: str) -> tuple[PolicyEntry, ...]:
        """Query, key and value are packed in the checkpoint."""
        return (
            replace_row(path, native_class="Phi3Attention", build=attention_of(NoPaddingRotaryAttention)),
            packed_qkv(f"{path}.qkv_proj"),
            row(f"{path}.o_proj"),
        )

    def mlp_rows(self, path: str) -> tuple[PolicyEntry, ...]:
        """Gate and up are packed in the checkpoint."""
        return (
            replace_row(path, native_class="Phi3MLP", build=gated_mlp),
            packed_gate_up(f"{path}.gate_up_proj"),
            row(f"{path}.down_proj"),
        )
