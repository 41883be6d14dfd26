"""Paged attention in Triton: prefill and decode are launched apart, sequences with one query token come first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inference_shardformer.kernels.triton import decode_kernel as decoding
from inference_shardformer.kernels.triton.prefill_kernel import prefill_kernel
from inference_shardformer.kernels.triton.runtime import as_stored, fp8_mode, has_wgmma, num_processors, unit_stride
from inference_shardformer.kernels.triton.shapes import (
    MAX_SPLITS,
    SPLIT_TOKENS,
    AttentionShape,
    DecodeWorkspace,
    PagedBatch,
    decode_tiles,
    num_splits,
    prefill_tiles,
)

_WAVES = 4  # programs per multiprocessor that a decode is cut into


class PagedAttention:
    """Both kernels for one shape. The result of a sequence does not depend on the others, bit for bit."""

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        self.shape = shape
        self._device = device
        self._decode = decode_tiles(shape)
        self._prefill = prefill_tiles(shape, has_wgmma=has_wgmma(device))
        self._programs_wanted = _WAVES * num_processors(device)
        self._window = shape.sliding_window or 0

    def workspace(self, num_decodes: int, seq_lens: Sequence[int] | None) -> DecodeWorkspace:
        """Room for the splits of so many decodes; `None`: of any length, as a captured graph needs."""
        heads, window, block_n = self.shape.num_heads, self.shape.sliding_window, self._decode.block_n
        splits = MAX_SPLITS
        if seq_lens is not None:
            splits = max((num_splits(seq_len, window, block_n) for seq_len in seq_lens), default=1)
        sharing = -(-self._programs_wanted // max(num_decodes * self._programs_of(self._decode.group_tile), 1))
        sizes = (num_decodes, heads, splits)
        return DecodeWorkspace(
            partial=torch.empty((*sizes, self.shape.head_pad), dtype=torch.float32, device=self._device),
            lse=torch.empty(sizes, dtype=torch.float32, device=self._device),
            num_programs=min(sharing, splits),
        )

    def run(
        self,
        q: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], any strides but the last
        v_cache: torch.Tensor,  # like k_cache
        batch: PagedBatch,
        workspace: DecodeWorkspace | None,  # for the batch's decodes; None where it has none
        sinks: torch.Tensor | None = None,  # [num_heads]
    ) -> torch.Tensor:
        """Decodes and prompts of one batch: `[num_tokens, num_heads, head_dim]` in and out."""
        q = unit_stride(q)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if workspace is not None:
            decodes = slice(batch.num_decodes)
            self._attend_decodes(q[decodes], k_cache, v_cache, out[decodes], batch, workspace, sinks)
        if len(q) > batch.num_decodes:
            self._attend_prompts(q, k_cache, v_cache, out, batch, sinks)
        return out

    def _attend_decodes(
        self,
        q: torch.Tensor,  # [num_decodes, num_heads, head_dim], any strides but the last
        k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], any strides but the last
        v_cache: torch.Tensor,
        out: torch.Tensor,  # like q, filled here
        batch: PagedBatch,
        workspace: DecodeWorkspace,
        sinks: torch.Tensor | None = None,  # [num_heads]
    ) -> None:
        """Attend with one query token per sequence: one launch over the context, one that joins the splits."""
        shape, tiles = self.shape, self._decode
        splitting = {
            "BLOCK_N": tiles.block_n,
            "SPLIT_TOKENS": SPLIT_TOKENS,
            "MAX_SPLITS": MAX_SPLITS,
            "WINDOW": self._window,
        }
        sizes = {"HEAD_DIM": shape.head_dim, "HEAD_PAD": shape.head_pad}
        max_splits = workspace.lse.shape[2]
        keys, values = as_stored(k_cache), as_stored(v_cache)
        grid = (len(q), self._programs_of(tiles.group_tile), workspace.num_programs)
        decoding.decode_kernel[grid](
            *(workspace.partial, workspace.lse, q, keys, values, batch.block_tables, batch.seq_lens),
            *(shape.scale, shape.softcap or 0.0, shape.num_heads, max_splits, *q.stride()[:2]),
            *(*keys.stride()[:3], *values.stride()[:3], batch.block_tables.stride(0)),
            **self._specialised(tiles.group_tile, k_cache.dtype),
            **splitting,
            BLOCK_M=tiles.block_m,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        decoding.combine_kernel[(len(q), shape.num_heads)](
            *(out, workspace.partial, workspace.lse, out if sinks is None else sinks, batch.seq_lens),
            *(max_splits, *out.stride()[:2]),
            **sizes,
            **splitting,
            HAS_SINKS=sinks is not None,
            num_warps=4 if shape.head_pad <= 128 else 8,
        )

    def _attend_prompts(
        self,
        q: torch.Tensor,  # [num_tokens, num_heads, head_dim] of the whole batch
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,  # like q; rows of decodes stay as they are
        batch: PagedBatch,
        sinks: torch.Tensor | None = None,  # [num_heads]
    ) -> None:
        """Attend with the sequences behind the decodes; their tiles are found on the device."""
        shape, tiles = self.shape, self._prefill
        num_seqs = len(batch.seq_lens)
        num_tiles = (len(q) - batch.num_decodes) // (tiles.block_m // tiles.group_tile) + num_seqs - batch.num_decodes
        keys, values = as_stored(k_cache), as_stored(v_cache)
        prefill_kernel[(num_tiles, self._programs_of(tiles.group_tile))](
            *(out, q, keys, values, out if sinks is None else sinks, batch.block_tables),
            *(batch.cu_seqlens_q, batch.seq_lens, batch.num_decodes, num_seqs, shape.scale, shape.softcap or 0.0),
            *(*out.stride()[:2], *q.stride()[:2], *keys.stride()[:3], *values.stride()[:3]),
            batch.block_tables.stride(0),
            **self._specialised(tiles.group_tile, k_cache.dtype),
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            WINDOW=self._window,
            HAS_SINKS=sinks is not None,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )

    def _specialised(self, group_tile: int, kv_dtype: torch.dtype) -> dict[str, int | bool]:
        shape = self.shape
        return {
            "GROUP": shape.group,
            "GROUP_TILE": group_tile,
            "HEAD_DIM": shape.head_dim,
            "HEAD_PAD": shape.head_pad,
            "BLOCK_SIZE": shape.block_size,
            "HAS_SOFTCAP": shape.softcap is not None,
            "FP8": fp8_mode(kv_dtype, self._device),
        }

    def _programs_of(self, group_tile: int) -> int:
        """Programs along the heads."""
        return self.shape.num_kv_heads * -(-self.shape.group // group_tile)
