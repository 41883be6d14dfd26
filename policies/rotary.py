"""Our rotary module made from a Hugging Face one, for every rope type Hugging Face initialises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn

from inference_shardformer.errors import UnsupportedModelError
from inference_shardformer.layers.layer_type_rotary import LayerTypeRotaryEmbedding
from inference_shardformer.layers.rotary import (
    LengthDependentRotaryEmbedding,
    RotaryEmbedding,
    TabledRotaryEmbedding,
)
from inference_shardformer.policies.base import BuildContext

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")


class _NativeRotary(Protocol):
    inv_freq: torch.Tensor
    attention_scaling: float


def rope_settings(hf_config: PreTrainedConfig) -> dict[str, object]:
    """The rope parameters of a configuration, whichever transformers version wrote it; always has `rope_type`."""
    settings = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    return {**settings, "rope_type": rope_type}


def check_rope_type(hf_config: PreTrainedConfig) -> None:
    """Raise `UnsupportedModelError` for a rope type that the installed transformers cannot initialise."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = rope_settings(hf_config)["rope_type"]
    known = sorted({"default", *ROPE_INIT_FUNCTIONS})
    if rope_type not in known:
        raise UnsupportedModelError(
            f"rope_type {rope_type!r} is not known to transformers", remedy=f"upgrade it, or use one of {known}"
        )


def context_length(hf_config: PreTrainedConfig) -> int:
    """Tokens the model's rope serves; dynamic NTK stretches the trained length by its factor."""
    settings = rope_settings(hf_config)
    length = int(hf_config.max_position_embeddings)
    return int(length * float(str(settings["factor"]))) if settings["rope_type"] == "dynamic" else length


def rotary_from_native(native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
    """Ask the native class for its frequencies with real values, and keep those alone."""
    config = context.hf_config
    with torch.device("cpu"):
        real = cast("_NativeRotary", type(native)(config=config))
    rope_type = str(rope_settings(config)["rope_type"])
    if rope_type not in LENGTH_DEPENDENT_ROPE_TYPES:
        return RotaryEmbedding(real.inv_freq, real.attention_scaling)

    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    initialise = ROPE_INIT_FUNCTIONS[rope_type]

    @lru_cache(maxsize=4096)
    def frequencies(length: int) -> torch.Tensor:
        return initialise(config, torch.device("cpu"), seq_len=length)[0]

    if context.group.device.type == "cpu":
        return LengthDependentRotaryEmbedding(frequencies, real.inv_freq, real.attention_scaling)
    longest = context.facts.max_position_embeddings
    return TabledRotaryEmbedding(frequencies, real.inv_freq, real.attention_scaling, longest=longest)


def rotary_by_layer_type(native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
    """Ask the native class for the frequencies of every type of layer."""
    with torch.device("cpu"):
        real = type(native)(config=context.hf_config)
    return LayerTypeRotaryEmbedding(
        {
            layer_type: RotaryEmbedding(
                cast("torch.Tensor", getattr(real, f"{layer_type}_inv_freq")),
                cast("float", getattr(real, f"{layer_type}_attention_scaling")),
            )
            for layer_type in sorted(set(context.hf_config.layer_types))
        }
    )


def rotary_of_own_config(native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
    """The module for windows was made with a configuration that differs from the model's."""
    own = cast("PreTrainedConfig", native.config)
    return rotary_from_native(native, children, replace(context, hf_config=own))
