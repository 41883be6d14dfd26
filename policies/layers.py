"""Decoder layers of LLaMA's shape, which a kernel may run whole."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import cast

from torch import nn

from inference_shardformer.layers.norm import RMSNorm
from inference_shardformer.modeling.nopadding_decoder_layer import NoPaddingDecoderLayer
from inference_shardformer.modeling.nopadding_llama import NoPaddingLlamaAttention, NoPaddingLlamaMLP
from inference_shardformer.policies.base import BuildContext, ReplaceEntry
from inference_shardformer.sharding.planner import ReplaceRow

_PARTS: Mapping[str, type[nn.Module]] = {
    "self_attn": NoPaddingLlamaAttention,
    "mlp": NoPaddingLlamaMLP,
    "input_layernorm": RMSNorm,
    "post_attention_layernorm": RMSNorm,
}


def llama_layer(pattern: str, *, native_class: str) -> ReplaceEntry:
    """Exchange layers of exactly `native_class` where the chosen kernel runs layers whole.

    Any other layer, and one in which a user's own module stands (see `adapting`, `leaving_out`), stays what it is, with
    our modules inside.
    """

    def build(native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
        is_ours = {name: type(child) for name, child in children.items()} == _PARTS
        if not (context.kernels.decoder_layer.runs_whole and is_ours and type(native).__name__ == native_class):
            return native
        return _layer(native, children, context)

    return ReplaceEntry(ReplaceRow(pattern), None, build)


def _layer(native: nn.Module, children: Mapping[str, nn.Module], context: BuildContext) -> nn.Module:
    return NoPaddingDecoderLayer(
        self_attn=cast("NoPaddingLlamaAttention", children["self_attn"]),
        mlp=cast("NoPaddingLlamaMLP", children["mlp"]),
        input_layernorm=cast("RMSNorm", children["input_layernorm"]),
        post_attention_layernorm=cast("RMSNorm", children["post_attention_layernorm"]),
        num_layers=context.facts.num_layers,
        kernel=context.kernels.decoder_layer,
        group=context.group,
        returns_tuple="tuple" in str(inspect.signature(type(native).forward).return_annotation).lower(),
        attention_type=str(getattr(native, "attention_type", "full_attention")),
    )
