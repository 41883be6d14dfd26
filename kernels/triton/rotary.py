"""Rotary embedding of packed queries and keys with the write into the paged cache, in one launch."""

from __future__ import annotations

from typing import Literal

import torch

from inference_shardformer.kernels.triton.rotary_kernel import rotary_kernel
from inference_shardformer.kernels.triton.runtime import as_stored, unit_stride
from inference_shardformer.kernels.triton.shapes import power_of_two

_HEAD_TILE = 16


def rotary_and_write_kv(
    qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], changed in place
    v_cache: torch.Tensor,  # like k_cache, changed in place
    slot_mapping: torch.Tensor,  # [num_tokens], slot = block_id * block_size + offset; negative: not stored
    *,
    cos: torch.Tensor,  # [num_tokens, rotary_dim], both halves hold the same angles
    sin: torch.Tensor,  # [num_tokens, rotary_dim]
    layout: Literal["NHD", "HND"] = "NHD",
) -> torch.Tensor:
    """Rotate queries and keys, store keys and values, and return the queries `[num_tokens, num_heads, head_dim]`.

    Only the first `rotary_dim` elements of a head turn; element `i` pairs with `i + rotary_dim / 2`. In layout HND
    the caches are `[num_blocks, num_kv_heads, block_size, head_dim]`. The caches may hold e4m3.
    """
    half = cos.shape[-1] // 2
    return _run(qkv, k_cache, v_cache, slot_mapping, (cos[:, :half], sin[:, :half]), None, layout)


def rotary_table_and_write_kv(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    table: torch.Tensor,  # float32 [num_positions, rotary_dim]: cosines, then sines, of rotary_dim / 2 angles
    positions: torch.Tensor,  # [num_tokens], below num_positions
    layout: Literal["NHD", "HND"] = "NHD",
) -> torch.Tensor:
    """As `rotary_and_write_kv`, with the angles of each token's position from a table."""
    half = table.shape[-1] // 2
    return _run(qkv, k_cache, v_cache, slot_mapping, (table[:, :half], table[:, half:]), positions, layout)


def _run(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],  # cosines and sines, [num_rows, rotary_dim / 2]
    rows: torch.Tensor | None,  # [num_tokens], of the angles; None: one row per token
    layout: Literal["NHD", "HND"],
) -> torch.Tensor:
    keys, values = as_stored(k_cache), as_stored(v_cache)
    if layout == "HND":
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    num_kv_heads, head_dim = keys.shape[2:]
    qkv, (cos, sin) = unit_stride(qkv), map(unit_stride, angles)
    num_all, half = qkv.shape[1] // head_dim, cos.shape[1]
    out = torch.empty(len(qkv), num_all - 2 * num_kv_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if not len(qkv):
        return out
    rest = head_dim - 2 * half
    rotary_kernel[(len(qkv), -(-num_all // _HEAD_TILE))](
        *(out, qkv, keys, values, slot_mapping, cos, sin, slot_mapping if rows is None else rows),
        *(qkv.stride(0), cos.stride(0), sin.stride(0), *keys.stride()[:3], *values.stride()[:3]),
        NUM_HEADS=out.shape[1],
        NUM_KV_HEADS=num_kv_heads,
        HEAD_TILE=_HEAD_TILE,
        HEAD_DIM=head_dim,
        HALF=half,
        HALF_PAD=power_of_two(half),
        REST_PAD=power_of_two(rest) if rest else 0,
        BLOCK_SIZE=keys.shape[1],
        HAS_ROWS=rows is not None,
        FP8=keys.dtype is not k_cache.dtype,
    )
    return out
