"""Gemma 3 (text): Gemma 2 without the cap of scores, with norms of heads and other rotary embeddings under windows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from inference_shardformer.errors import UnsupportedModelError
from inference_shardformer.policies.base import PolicyEntry
from inference_shardformer.policies.gemma2 import Gemma2Policy
from inference_shardformer.policies.rotary import (
    LENGTH_DEPENDENT_ROPE_TYPES,
    rope_settings,
    rotary_by_layer_type,
    rotary_of_own_config,
)
from inference_shardformer.policies.rows import replace
from inference_shardformer.policies.windows import SlidingWindows, windows_by_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from inference_shardformer.config.model import ModelFacts


class Gemma3Policy(Gemma2Policy):
    """Shards `Gemma3ForCausalLM`. Scores are not capped: Hugging Face reads `attn_logit_softcapping` and ignores it."""

    architectures: ClassVar[tuple[str, ...]] = ("Gemma3ForCausalLM",)
    family: ClassVar[str] = "Gemma3"
    head_norms: ClassVar[tuple[str, ...]] = ("q_norm", "k_norm")
    served: ClassVar[Mapping[str, object]] = MappingProxyType(
        {"use_bidirectional_attention": False, "attn_logit_softcapping": None}
    )

    def facts(self, hf_config: PreTrainedConfig) -> ModelFacts:
        """Facts of a configuration; raises `UnsupportedModelError` for rope types that depend on the length."""
        settings = rope_settings(hf_config)
        by_layer_type = [part for part in settings.values() if isinstance(part, dict)]  # transformers 5
        rope_types = {str(part.get("rope_type", "default")) for part in (settings, *by_layer_type)}
        refused = sorted(rope_types.intersection(LENGTH_DEPENDENT_ROPE_TYPES))
        if refused:
            raise UnsupportedModelError(
                f"Gemma 3 with rope_type {refused} is not served: only some of its layers would depend on the length",
                remedy="use default, linear, yarn or llama3",
            )
        return super().facts(hf_config)

    def sliding_windows(self, hf_config: PreTrainedConfig) -> SlidingWindows:
        """All layers but every sixth, or as the configuration says."""
        return windows_by_pattern(hf_config, every=int(getattr(hf_config, "sliding_window_pattern", 6)))

    def rotary_rows(self) -> tuple[PolicyEntry, ...]:
        """One module that is asked by type of layer, or in older transformers one for windows and one for the rest."""
        native_class = "Gemma3RotaryEmbedding"
        if _asks_by_layer_type():
            return (replace("model.rotary_emb", native_class=native_class, build=rotary_by_layer_type),)
        return tuple(
            replace(path, native_class=native_class, build=rotary_of_own_config)
            for path in ("model.rotary_emb", "model.rotary_emb_local")
        )


def _asks_by_layer_type() -> bool:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    return "layer_type" in inspect.signature(Gemma3RotaryEmbedding.forward).parameters
