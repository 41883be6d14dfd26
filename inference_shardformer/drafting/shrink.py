"""A small model of the same architecture with random weights, on which a draft is proven without a checkpoint."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from inference_shardformer.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SMALL: dict[str, int] = {
    "vocab_size": 157,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_HEADS, _HEAD_DIM, _WINDOW, _MIN_LAYERS = 8, 16, 7, 3


def small_model(hf_config: PreTrainedConfig, architecture: str, *, seed: int = 0) -> PreTrainedModel:
    """The model of a shrunken configuration: few layers of every type, small windows, weights spread wide.

    Raises `UnsupportedModelError` if the architecture cannot be made that small.
    """
    import transformers

    config = _shrunken(hf_config)
    try:
        with torch.device("cpu"):
            model: PreTrainedModel = getattr(transformers, architecture)(config)
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as exc:
        raise UnsupportedModelError(
            f"a small {architecture} for proving the draft cannot be made: {type(exc).__name__}: {exc}",
            remedy="verify the draft on a real checkpoint: inference-shardformer verify --policy ...",
        ) from exc
    _spread(model.float().eval(), seed)
    model.generation_config.eos_token_id = None
    return model


def _shrunken(hf_config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(hf_config)
    num_heads = int(config.num_attention_heads)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    kv_heads = _HEADS if num_kv_heads == num_heads else 1 if num_kv_heads == 1 else _HEADS // 4
    values: dict[str, object] = {
        "hidden_size": _HEADS * _HEAD_DIM,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": kv_heads,
        "head_dim": _HEAD_DIM,
    }
    for name, value in {**_SMALL, **values}.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    if getattr(config, "sliding_window", None):
        config.sliding_window = _WINDOW
    layer_types = getattr(config, "layer_types", None)
    kinds = list(dict.fromkeys(layer_types or ()))
    num_layers = max(_MIN_LAYERS, len(kinds))
    config.num_hidden_layers = num_layers
    if layer_types:
        config.layer_types = (kinds * num_layers)[:num_layers]
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    return config


def _spread(model: nn.Module, seed: int) -> None:
    """Random values for everything, so that nothing is one or zero by default and no greedy choice is close."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(parameter + 0.1 * noise if "norm" in name.lower() else 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
