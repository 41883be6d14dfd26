"""Rotary embedding by torch, with the attention backend's own write: what serves where no kernel does both."""

from __future__ import annotations

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata
from inference_shardformer.compute.rotary_write import RotaryWrite
from inference_shardformer.kv_cache.cache import LayerKVCache
from inference_shardformer.layers.rotary import rotate


def turn_then_write(backend: AttentionBackend, num_heads: int, num_kv_heads: int) -> RotaryWrite:
    """What a layer of this backend and so many heads calls."""

    def run(
        heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata
    ) -> torch.Tensor:
        queries_and_keys, values = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
        turned = _turn(queries_and_keys, cos.unsqueeze(1), sin.unsqueeze(1))
        q, k = turned.split((num_heads, num_kv_heads), dim=1)
        backend.write(k, values, cache, meta)
        return q

    return run


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn a part of `x` `[num_tokens, heads, head_dim]`; cos and sin are `[num_tokens, 1, rotary_dim]`."""
    rotary_dim = cos.shape[-1]
    if rotary_dim == x.shape[-1]:
        return rotate(x, cos, sin)
    return torch.cat((rotate(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), dim=-1)
