"""Qwen2: LLaMA with biases on query, key and value, and sliding windows in its last layers where asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from inference_shardformer.policies.decoder import LlamaShapedPolicy
from inference_shardformer.policies.windows import SlidingWindows, windows_of_last_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Qwen2Policy(LlamaShapedPolicy):
    """Shards `Qwen2ForCausalLM`."""

    architectures: ClassVar[tuple[str, ...]] = ("Qwen2ForCausalLM",)
    family: ClassVar[str] = "Qwen2"
    can_capture: ClassVar[bool] = True
    layer_shape: ClassVar[str] = "llama"
    model_shape: ClassVar[str] = "llama"

    def sliding_windows(self, hf_config: PreTrainedConfig) -> SlidingWindows:
        """With `use_sliding_window`, the layers from `max_window_layers` on."""
        return windows_of_last_layers(hf_config)
