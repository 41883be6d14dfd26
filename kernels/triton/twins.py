"""Kernels by the signatures of their twins in `kernels.reference`, for tests and for use without a plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inference_shardformer.kernels.triton.paged_attention import PagedAttention
from inference_shardformer.kernels.triton.shapes import AttentionShape


@dataclass(frozen=True)
class _Batch:
    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    num_decodes: int


def paged_attention(
    q: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    *,
    cu_seqlens_q: torch.Tensor,  # int32 [num_seqs + 1]
    seq_lens: torch.Tensor,  # int32 [num_seqs]
    block_tables: torch.Tensor,  # int32 [num_seqs, max_blocks]
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [num_heads]
) -> torch.Tensor:
    """As `reference.paged_attention`. Waits for the lengths; a step that must not wait plans with `PagedAttention`."""
    shape = AttentionShape(
        num_heads=q.shape[1],
        num_kv_heads=k_cache.shape[2],
        head_dim=q.shape[2],
        block_size=k_cache.shape[1],
        dtype=q.dtype,
        kv_dtype=k_cache.dtype,
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    query_lens = cu_seqlens_q.diff().tolist()
    num_decodes = next((at for at, length in enumerate(query_lens) if length != 1), len(query_lens))
    attention = PagedAttention(shape, q.device)
    workspace = attention.workspace(num_decodes, seq_lens[:num_decodes].tolist()) if num_decodes else None
    batch = _Batch(cu_seqlens_q, seq_lens, block_tables, num_decodes)
    return attention.run(q, k_cache, v_cache, batch, workspace, sinks)
