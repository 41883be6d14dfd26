"""Rotary embedding of packed queries and keys with the write into the paged cache, in one native kernel."""

from __future__ import annotations

from typing import Literal

import torch

from inference_shardformer.kernels.cpu.arguments import RotaryArgs
from inference_shardformer.kernels.cpu.library import NativeKernel
from inference_shardformer.kernels.cpu.rows import check_alike, dtype_of, output, rows_of

_rotary = NativeKernel("rotary", RotaryArgs)


def rotary_and_write_kv(
    qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], changed in place
    v_cache: torch.Tensor,  # like k_cache, changed in place
    slot_mapping: torch.Tensor,  # int64 [num_tokens], slot = block_id * block_size + offset; negative: not stored
    *,
    cos: torch.Tensor,  # [num_tokens, rotary_dim], both halves hold the same angles
    sin: torch.Tensor,  # [num_tokens, rotary_dim]
    layout: Literal["NHD", "HND"] = "NHD",
    q_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, store keys and values, and return the queries `[num_tokens, num_heads, head_dim]`.

    Only the first `rotary_dim` elements of a head turn; element `i` pairs with `i + rotary_dim / 2`. In layout HND
    the caches are `[num_blocks, num_kv_heads, block_size, head_dim]`.
    """
    angles = rows_of("cos", cos)
    if rows_of("sin", sin) != angles or cos.dtype != qkv.dtype or sin.dtype != qkv.dtype or len(cos) != len(qkv):
        raise ValueError(
            f"cos {cos.dtype} {tuple(cos.shape)} and sin {sin.dtype} {tuple(sin.shape)} must be alike, with a row for "
            f"each of the {len(qkv)} tokens, in {qkv.dtype}"
        )
    sources = (cos.data_ptr(), sin.data_ptr(), None, None)
    return _run(qkv, k_cache, v_cache, slot_mapping, sources, angles.size, angles.stride, layout, q_out)


def rotary_table_and_write_kv(
    qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], changed in place
    v_cache: torch.Tensor,  # like k_cache, changed in place
    slot_mapping: torch.Tensor,  # int64 [num_tokens]
    *,
    table: torch.Tensor,  # float32 [num_positions, rotary_dim]: cosines, then sines, of rotary_dim / 2 angles
    positions: torch.Tensor,  # int64 [num_tokens], below num_positions
    layout: Literal["NHD", "HND"] = "NHD",
    q_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `rotary_and_write_kv`, with the angles of each token's position from a table."""
    check_alike("table", table, torch.empty(0), table.shape)
    _check_integers("positions", positions, len(qkv))
    sources = (None, None, table.data_ptr(), positions.data_ptr())
    return _run(qkv, k_cache, v_cache, slot_mapping, sources, table.shape[-1], 0, layout, q_out)


def _run(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    sources: tuple[int | None, int | None, int | None, int | None],
    rotary_dim: int,
    angle_stride: int,
    layout: Literal["NHD", "HND"],
    q_out: torch.Tensor | None,
) -> torch.Tensor:
    code, rows = dtype_of("qkv", qkv), rows_of("qkv", qkv)
    head_axis, slot_axis = (2, 1) if layout == "NHD" else (1, 2)
    num_kv_heads, block_size, head_dim = k_cache.shape[head_axis], k_cache.shape[slot_axis], k_cache.shape[3]
    _check_caches(qkv, k_cache, v_cache)
    num_heads, rest = divmod(rows.size - 2 * num_kv_heads * head_dim, head_dim)
    if rest or num_heads < 0 or rotary_dim > head_dim or rotary_dim % 2:
        raise ValueError(
            f"{rows.size} columns of qkv and rotary_dim={rotary_dim} do not fit {num_kv_heads} KV heads of {head_dim}: "
            "columns are whole heads, of which an even part turns"
        )
    _check_integers("slot_mapping", slot_mapping, rows.num_rows)
    q_out = output(q_out, qkv, (rows.num_rows, num_heads, head_dim))
    strides = k_cache.stride()
    _rotary(
        *(q_out.data_ptr(), qkv.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), *sources, slot_mapping.data_ptr()),
        *(rows.num_rows, num_heads, num_kv_heads, head_dim, rotary_dim, block_size, rows.stride, angle_stride),
        *(strides[0], strides[slot_axis], strides[head_axis], code, 0),
    )
    return q_out


def _check_caches(qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    is_alike = k_cache.shape == v_cache.shape and k_cache.stride() == v_cache.stride() and k_cache.stride(3) == 1
    if not (is_alike and k_cache.dtype == v_cache.dtype == qkv.dtype and k_cache.is_cpu and v_cache.is_cpu):
        raise ValueError(
            f"k_cache {k_cache.dtype} {tuple(k_cache.shape)} and v_cache {v_cache.dtype} {tuple(v_cache.shape)} must "
            f"be alike in shape and strides, contiguous along the head, in {qkv.dtype} on the CPU"
        )


def _check_integers(name: str, t: torch.Tensor, count: int) -> None:
    if t.dtype != torch.int64 or t.shape != (count,) or not (t.is_contiguous() and t.is_cpu):
        raise ValueError(
            f"{name} is {t.dtype} {tuple(t.shape)}; the kernel needs contiguous int64 ({count},) on the CPU"
        )
