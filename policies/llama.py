"""LLaMA: grouped-query attention, gated MLP, optional biases, every rope type of Hugging Face."""

from __future__ import annotations

from typing import ClassVar

from inference_shardformer.policies.decoder import LlamaShapedPolicy


class LlamaPolicy(LlamaShapedPolicy):
    """Shards `LlamaForCausalLM`."""

    architectures: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM",)
    family: ClassVar[str] = "Llama"
    can_capture: ClassVar[bool] = True
    layer_shape: ClassVar[str] = "llama"
    model_shape: ClassVar[str] = "llama"
