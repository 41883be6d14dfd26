"""Baichuan-7B: LLaMA whose checkpoints keep query, key and value in one tensor called W_pack."""

from __future__ import annotations

from typing import ClassVar

from inference_shardformer.modeling.nopadding_llama import NoPaddingLlamaAttention
from inference_shardformer.policies.base import PolicyEntry
from inference_shardformer.policies.decoder import LlamaShapedPolicy, attention_of
from inference_shardformer.policies.rows import packed_qkv, replace, row


class BaichuanPolicy(LlamaShapedPolicy):
    """Shards a `BaichuanForCausalLM` made of LLaMA's modules but for its attention.

    transformers has no such class: give a local one, whose layers hand keyword arguments on to their attention, to
    `optimize`, or register it with `AutoModelForCausalLM`. The code that comes with checkpoints does not, and its
    classes are refused by name.
    """

    architectures: ClassVar[tuple[str, ...]] = ("BaichuanForCausalLM",)
    family: ClassVar[str] = "Llama"
    layer_shape: ClassVar[str] = "llama"
    attention_class: ClassVar[str] = "BaichuanAttention"

    def attention_rows(self, path: str) -> tuple[PolicyEntry, ...]:
        """Query, key and value are packed in the checkpoint."""
        return (
            replace(path, native_class=self.attention_class, build=attention_of(NoPaddingLlamaAttention)),
            packed_qkv(f"{path}.qkv_proj", "W_pack"),
            row(f"{path}.o_proj"),
        )
