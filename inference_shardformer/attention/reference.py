"""Backend `reference`: plain torch, slow, the oracle that other backends are compared with."""

from __future__ import annotations

from typing import ClassVar

import torch

from inference_shardformer.attention.base import (
    AttentionBackend,
    AttentionCapabilities,
    AttentionMetadata,
    Feature,
    RaggedBatch,
)
from inference_shardformer.attention.requirements import FLOAT_DTYPES
from inference_shardformer.kernels import reference as kernels
from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache


class ReferenceAttention(AttentionBackend):
    """Attention by the reference kernels, one sequence at a time, one type wider than the data."""

    name: ClassVar[str] = "reference"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[AttentionCapabilities] = AttentionCapabilities(
        devices=("cpu", "cuda"),
        dtypes=FLOAT_DTYPES,
        kv_dtypes=(torch.float8_e4m3fn,),
        features=frozenset(Feature) - {Feature.GRAPHS},
    )

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> AttentionMetadata:
        """Nothing to prepare."""
        return AttentionMetadata(batch=batch, kv_cache=kv_cache)

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        """Attend with the reference kernel: `[num_tokens, num_heads, head_dim]` in and out."""
        return self._attend(q, cache, meta, None)

    def attend_with_sinks(
        self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata, sinks: torch.Tensor
    ) -> torch.Tensor:
        """As `attend`, with one more logit per head in the denominator; `sinks` is `[num_heads]`."""
        return self._attend(q, cache, meta, sinks)

    def _attend(
        self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        return kernels.paged_attention(
            q,
            cache.keys,
            cache.values,
            cu_seqlens_q=meta.batch.cu_seqlens_q,
            seq_lens=meta.batch.seq_lens,
            block_tables=meta.batch.block_tables,
            scale=self.spec.scale,
            sliding_window=self.spec.sliding_window,
            softcap=self.spec.softcap,
            sinks=sinks,
        )
