"""Whether requests share the blocks of equal prefixes, and why."""

from __future__ import annotations

from typing import Literal, NamedTuple

from inference_shardformer.config.inference import InferenceConfig
from inference_shardformer.config.model import ModelFacts


class PrefixCaching(NamedTuple):
    """Whether blocks are shared, and why; no reason where it is as asked."""

    value: Literal["on", "off"]
    reason: str


def choose_prefix_caching(inference: InferenceConfig, facts: ModelFacts) -> PrefixCaching:
    """As asked; automatically on, but where prompts of different lengths have no keys in common."""
    asked = inference.cache.prefix_caching
    if asked != "auto":
        return PrefixCaching(asked, "")
    if facts.length_dependent_rope and facts.rope_switch_length is None:
        return PrefixCaching("off", "the rotary frequencies depend on the length of the prompt, and so do all keys")
    return PrefixCaching("on", "a prompt goes on after the blocks that are found as after a chunk of its own")
