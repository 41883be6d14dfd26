"""The forward pass of a whole causal language model over packed tokens."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.modules import module as _of_all_modules

from inference_shardformer.attention.base import AttentionMetadata
from inference_shardformer.compute.decoder_layer import Angles, ModelEnds, ModelFunction
from inference_shardformer.errors import StateError
from inference_shardformer.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from inference_shardformer.layers.norm import RMSNorm
from inference_shardformer.layers.rotary import RotaryTable
from inference_shardformer.modeling.nopadding_decoder_layer import NoPaddingDecoderLayer, linear_part, norm_part


class PackedOutput(NamedTuple):
    """What the engine reads of a model's output; `greatest` where they were found in passing, see `ModelResult`."""

    logits: torch.Tensor  # float32 [num_logits, vocabulary on this rank]
    greatest: tuple[torch.Tensor, torch.Tensor] | None = None


class PlainForward:
    """A sharded model by Hugging Face's `forward`, or by its user's."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    @torch.inference_mode()
    def __call__(self, **inputs: Any) -> PackedOutput:
        """The engine's arguments reach the model as they are."""
        return PackedOutput(self._model(**inputs).logits[0].float())


class PackedForward:
    """A sharded model of LLaMA's outline: embedding, angles, layers, norm, head.

    Does what Hugging Face's `forward` does with a packed batch, without what that does for others: masks, caches,
    collected outputs. Only tokens whose logits are wanted are normalised at the end. Where the layers' kernel runs the
    model whole it does so in one call, while nobody's hooks watch a module. Else modules are called one by one, so that
    their hooks run; where somebody's hooks are on the whole model or on its decoder, Hugging Face's own is called. A
    module before or behind the layers that is exchanged takes effect with the next call.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = cast("Any", model)
        self._layers = _layers_of(model)
        self._bind()

    def _bind(self) -> None:
        """Take the model as it is now, but for its layers."""
        self._decoder = decoder = self._model.model
        ends, self._places = _ends_of(self._model), _exchangeable(self._model)
        self._held = [kept.get(name) for kept, name in self._places]
        self._layer_modules = decoder.layers._modules
        first = cast(NoPaddingDecoderLayer, self._layers[0])
        watched: tuple[nn.Module, ...] = (self._model, decoder, *ends)
        self._hooks = (
            *(hooks for module in watched for hooks in (module._forward_hooks, module._forward_pre_hooks)),
            *(_of_all_modules._global_forward_hooks, _of_all_modules._global_forward_pre_hooks),
        )
        self._whole = _whole_model(first, *ends)
        self._like = torch.empty(0, dtype=first.backend.spec.dtype)
        self._table = RotaryTable(decoder.rotary_emb, self._like.dtype)

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
        return own and all(isinstance(layer, NoPaddingDecoderLayer) for layer in _layers_of(model))

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        use_cache: bool,
        attn_metadata: AttentionMetadata,
        logits_to_keep: torch.Tensor,
    ) -> PackedOutput:
        """Token ids `[1, num_tokens]` and positions to the logits after the tokens at `logits_to_keep`.

        Raises `StateError` for a decoder layer that was exchanged.
        """
        self._follow_exchanges()
        if self._whole is not None and not any(self._hooks):
            angles = self._angles_at(position_ids, attn_metadata)
            result = self._whole(input_ids, angles, attn_metadata, logits_to_keep)
            if result is not None:
                return PackedOutput(*result)
        if _is_watched(self._model) or _is_watched(self._decoder):
            return PlainForward(self._model)(
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=use_cache,
                attn_metadata=attn_metadata,
                logits_to_keep=logits_to_keep,
            )
        return PackedOutput(self._by_modules(input_ids, position_ids, attn_metadata, logits_to_keep))

    def _follow_exchanges(self) -> None:
        if not all(map(is_, [kept.get(name) for kept, name in self._places], self._held)):
            self._bind()
        if len(self._layer_modules) != len(self._layers) or not all(
            map(is_, self._layer_modules.values(), self._layers)
        ):
            raise StateError(
                "the decoder layers of this model are not those that it was attached with",
                remedy="exchange layers before the model is sharded; to look into one, give it a forward hook",
            )

    def _angles_at(self, position_ids: torch.Tensor, attn_metadata: AttentionMetadata) -> Angles:
        """Of every token: looked up, or computed where they depend on more than positions."""
        if position_ids.shape[0] == 1:
            return Angles(*self._table.upto(max(attn_metadata.batch.host_seq_lens)), position_ids)
        cos, sin = self._decoder.rotary_emb(self._like, position_ids)
        return Angles(cos[0].contiguous(), sin[0].contiguous(), None)

    @torch.inference_mode()
    def _by_modules(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attn_metadata: AttentionMetadata,
        logits_to_keep: torch.Tensor,
    ) -> torch.Tensor:
        decoder = self._decoder
        hidden_states = decoder.embed_tokens(input_ids)
        position_embeddings = decoder.rotary_emb(hidden_states, position_ids)
        for layer in decoder.layers:
            out = layer(hidden_states, position_embeddings=position_embeddings, attn_metadata=attn_metadata)
            hidden_states = out[0] if isinstance(out, tuple) else out  # transformers 4 expects tuples
            if layer.were_all_run(hidden_states):
                break
        if len(logits_to_keep) != hidden_states.shape[1]:  # else they are all, in their order
            hidden_states = hidden_states[:, logits_to_keep]
        return self._model.lm_head(decoder.norm(hidden_states))[0].float()


def _layers_of(model: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(cast("Any", model).model.layers)


def _ends_of(model: Any) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """Embedding, rotary embedding, norm and head."""
    decoder = model.model
    return decoder.embed_tokens, decoder.rotary_emb, decoder.norm, model.lm_head


def _exchangeable(model: Any) -> tuple[tuple[Mapping[str, object], str], ...]:
    """Where what may be another object after `attach` is kept: every step looks, so not by `nn.Module`'s slower way."""
    decoder = model.model
    return (
        *((model._modules, name) for name in ("model", "lm_head")),
        *((decoder._modules, name) for name in ("embed_tokens", "rotary_emb", "layers", "norm")),
        (decoder.norm._parameters, "weight"),
        *((vars(module), "forward") for module in _ends_of(model)),
    )


def _whole_model(
    layer: NoPaddingDecoderLayer, embedding: nn.Module, rotary: nn.Module, norm: nn.Module, head: nn.Module
) -> ModelFunction | None:
    """What runs the model in one call, where its ends are ours and unchanged, too."""
    ends = (embedding, rotary, norm, head)
    known = type(embedding) is VocabParallelEmbedding and type(norm) is RMSNorm and type(head) is ParallelLMHead
    if not known or any("forward" in vars(module) for module in ends):
        return None
    embedding, norm = cast(VocabParallelEmbedding, embedding), cast(RMSNorm, norm)
    return layer.bind_model(
        ModelEnds(embedding.stored, (embedding.start, embedding.stop), norm_part(norm), linear_part(head))
    )


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def forward_of(model: nn.Module, model_shape: str) -> PackedForward | PlainForward:
    """What runs the model on packed batches: `PackedForward` where policy and model allow it, else its own forward."""
    return PackedForward(model) if model_shape == "llama" and PackedForward.serves(model) else PlainForward(model)
