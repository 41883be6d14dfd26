"""The forward pass of a whole causal language model over packed tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from inference_shardformer.attention.base import AttentionMetadata
from inference_shardformer.modeling.nopadding_decoder_layer import NoPaddingDecoderLayer


class PackedOutput(NamedTuple):
    """What the engine reads of a model's output."""

    logits: torch.Tensor  # [1, num_logits, vocabulary on this rank]


class PackedForward:
    """A sharded model of LLaMA's outline: embedding, angles, layers, norm, head.

    Does what Hugging Face's `forward` does with a packed batch, without what that does for others: masks, caches,
    collected outputs. Only tokens whose logits are wanted are normalised at the end. Modules are called one by one, so
    that their hooks run; where somebody's hooks are on the whole model or on its decoder, Hugging Face's own is called.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._decoder: Any = model.model

    @staticmethod
    def serves(model: nn.Module) -> bool:
        """Whether the model's `forward` is Hugging Face's, and its layers are ours."""
        decoder = getattr(model, "model", None)
        if not isinstance(decoder, nn.Module):
            return False
        own = all(
            type(each).__module__.startswith("transformers.models.") and "forward" not in vars(each)
            for each in (model, decoder)
        )
        return own and all(isinstance(layer, NoPaddingDecoderLayer) for layer in cast("nn.ModuleList", decoder.layers))

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        use_cache: bool,
        attn_metadata: AttentionMetadata,
        logits_to_keep: torch.Tensor,
    ) -> PackedOutput:
        """Token ids `[1, num_tokens]` and positions to the logits after the tokens at `logits_to_keep`."""
        model, decoder = self._model, self._decoder
        if _is_watched(model) or _is_watched(decoder):
            output = model(
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=use_cache,
                attn_metadata=attn_metadata,
                logits_to_keep=logits_to_keep,
            )
            return PackedOutput(output.logits)
        hidden_states = decoder.embed_tokens(input_ids)
        position_embeddings = decoder.rotary_emb(hidden_states, position_ids)
        for layer in decoder.layers:
            out = layer(hidden_states, position_embeddings=position_embeddings, attn_metadata=attn_metadata)
            hidden_states = out[0] if isinstance(out, tuple) else out  # transformers 4 expects tuples
            if layer.were_all_run(hidden_states):
                break
        if len(logits_to_keep) != hidden_states.shape[1]:  # else they are all, in their order
            hidden_states = hidden_states[:, logits_to_keep]
        return PackedOutput(model.lm_head(decoder.norm(hidden_states)))


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def forward_of(model: nn.Module, model_shape: str) -> Callable[..., Any]:
    """What runs the model on packed batches: `PackedForward` where policy and model allow it, else the model."""
    return PackedForward(model) if model_shape == "llama" and PackedForward.serves(model) else model
