"""Backend `reference`: plain torch, slow, the oracle that other backends are compared with."""

from __future__ import annotations

from typing import ClassVar

import torch

from inference_shardformer.attention.base import AttentionBackend, AttentionMetadata, AttentionSpec, RaggedBatch, Reason
from inference_shardformer.attention.requirements import device_reasons, dtype_reasons, shape_reasons
from inference_shardformer.kernels import reference as kernels
from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache


class ReferenceAttention(AttentionBackend):
    """Attention by the reference kernels, one sequence at a time, one type wider than the data."""

    name: ClassVar[str] = "reference"

    @classmethod
    def reasons(cls, spec: AttentionSpec) -> list[Reason]:
        """Serves every sound shape in fp32, bf16 and fp16 on a CPU or a CUDA device."""
        return [*shape_reasons(spec), *dtype_reasons(spec), *device_reasons(spec)]

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> AttentionMetadata:
        """Nothing to prepare."""
        return AttentionMetadata(batch=batch, kv_cache=kv_cache)

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        """Attend with the reference kernel: `[num_tokens, num_heads, head_dim]` in and out."""
        return kernels.paged_attention(
            q,
            cache.keys,
            cache.values,
            cu_seqlens_q=meta.batch.cu_seqlens_q,
            seq_lens=meta.batch.seq_lens,
            block_tables=meta.batch.block_tables,
            scale=self.spec.scale,
            sliding_window=self.spec.sliding_window,
        )
