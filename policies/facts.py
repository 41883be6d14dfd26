"""Facts of a decoder-only model from its Hugging Face configuration, whichever version wrote it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from inference_shardformer.config.model import ModelFacts
from inference_shardformer.errors import CheckpointError
from inference_shardformer.policies.rotary import (
    LENGTH_DEPENDENT_ROPE_TYPES,
    check_rope_type,
    context_length,
    rope_settings,
)
from inference_shardformer.policies.windows import SlidingWindows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def decoder_facts(
    hf_config: PreTrainedConfig,
    *,
    architecture: str,
    intermediate_size: str = "intermediate_size",
    activation: str | None = "hidden_act",
    sliding_windows: SlidingWindows = (),
) -> ModelFacts:
    """Facts of a decoder's configuration.

    `intermediate_size` and `activation` name fields; without an activation the MLP is not gated.

    Raises `CheckpointError` for quantised checkpoints, for sizes below 1 and for head counts that contradict each
    other, and `UnsupportedModelError` for an unknown rope type.
    """
    if getattr(hf_config, "quantization_config", None):
        raise CheckpointError(
            f"this {architecture} is quantised ({_quantisation(hf_config)}), which is not supported",
            remedy="use the unquantised checkpoint",
        )
    check_rope_type(hf_config)
    _check_counts(hf_config)
    heads = int(hf_config.num_attention_heads)
    kv_heads = int(getattr(hf_config, "num_key_value_heads", None) or heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}",
            remedy="correct config.json",
        )
    return ModelFacts(
        architecture=architecture,
        model_type=str(hf_config.model_type),
        vocab_size=int(hf_config.vocab_size),
        hidden_size=int(hf_config.hidden_size),
        intermediate_size=int(getattr(hf_config, intermediate_size)),
        num_layers=int(hf_config.num_hidden_layers),
        total_num_heads=heads,
        total_num_kv_heads=kv_heads,
        head_dim=int(getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads),
        max_position_embeddings=context_length(hf_config),
        eos_token_ids=token_ids(hf_config.eos_token_id),
        tie_word_embeddings=bool(hf_config.tie_word_embeddings),
        checkpoint_dtype=_checkpoint_dtype(hf_config),
        activation=str(getattr(hf_config, activation)) if activation else "",
        length_dependent_rope=rope_settings(hf_config)["rope_type"] in LENGTH_DEPENDENT_ROPE_TYPES,
        sliding_windows=sliding_windows,
    )


def _check_counts(hf_config: PreTrainedConfig) -> None:
    """Raise `CheckpointError` for sizes below 1; transformers reads them without complaint."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    wrong = [f"{name}={count}" for name in names if (count := int(getattr(hf_config, name))) < 1]
    if wrong:
        raise CheckpointError(f"config.json: {', '.join(wrong)}: must be at least 1", remedy="correct it")


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Token ids of a configuration field that holds one, several or none."""
    if value is None:
        return ()
    return (int(value),) if isinstance(value, int) else tuple(int(item) for item in value)


def _checkpoint_dtype(hf_config: PreTrainedConfig) -> str | None:
    name = "dtype" if hasattr(hf_config, "dtype") else "torch_dtype"  # transformers 4 knew the second alone
    dtype = getattr(hf_config, name, None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    return _DTYPE_NAMES.get(dtype) if dtype is not None else None


def _quantisation(hf_config: PreTrainedConfig) -> str:
    settings = hf_config.quantization_config
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(method or "unnamed method")
