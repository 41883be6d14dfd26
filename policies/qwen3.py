"""Qwen3: Qwen2 with a norm on each head of queries and keys, in place of biases."""

from __future__ import annotations

from typing import ClassVar

from inference_shardformer.policies.qwen2 import Qwen2Policy


class Qwen3Policy(Qwen2Policy):
    """Shards `Qwen3ForCausalLM`."""

    architectures: ClassVar[tuple[str, ...]] = ("Qwen3ForCausalLM",)
    family: ClassVar[str] = "Qwen3"
    head_norms: ClassVar[tuple[str, ...]] = ("q_norm", "k_norm")
    layer_shape: ClassVar[str] = ""  # its attention has norms of heads
