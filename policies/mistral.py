"""Mistral: LLaMA with one sliding window for all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from inference_shardformer.policies.decoder import LlamaShapedPolicy
from inference_shardformer.policies.windows import SlidingWindows, same_window_everywhere

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class MistralPolicy(LlamaShapedPolicy):
    """Shards `MistralForCausalLM`."""

    architectures: ClassVar[tuple[str, ...]] = ("MistralForCausalLM",)
    family: ClassVar[str] = "Mistral"
    can_capture: ClassVar[bool] = True
    layer_shape: ClassVar[str] = "llama"
    model_shape: ClassVar[str] = "llama"

    def sliding_windows(self, hf_config: PreTrainedConfig) -> SlidingWindows:
        """`sliding_window` tokens in every layer, or none."""
        return same_window_everywhere(hf_config)
