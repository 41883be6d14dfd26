"""Backend `cpu`: paged, ragged, grouped-query attention by the native kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel

from inference_shardformer.attention.base import (
    AttentionBackend,
    AttentionCapabilities,
    AttentionMetadata,
    AttentionSpec,
    Feature,
    KVLayout,
    RaggedBatch,
    Sizes,
    stores_by_slot,
)
from inference_shardformer.attention.requirements import FLOAT_DTYPES
from inference_shardformer.kernels.cpu.attention import (
    MAX_HEAD_DIM,
    AttentionShape,
    PagedAttention,
    PlannedAttention,
    write_kv,
)
from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache


@dataclass(frozen=True)
class CpuMetadata(AttentionMetadata):
    """The work items of one step."""

    planned: PlannedAttention


class CpuAttention(AttentionBackend):
    """One native call for each layer: decodes, prompts and pieces of prompts are shared out among torch's threads.

    The result of a sequence does not depend on the number of threads, nor on the other sequences.
    """

    name: ClassVar[str] = "cpu"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[AttentionCapabilities] = AttentionCapabilities(
        devices=("cpu",),
        dtypes=FLOAT_DTYPES,
        head_dims=Sizes(high=MAX_HEAD_DIM),
        features=frozenset(Feature) - {Feature.GRAPHS},
        kv_layout=KVLayout.HND,
        needs_native=True,
    )

    def __init__(self, spec: AttentionSpec, options: BaseModel | None = None) -> None:
        super().__init__(spec, options)
        shape = AttentionShape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            block_size=spec.block_size,
            dtype=spec.dtype,
            scale=spec.scale,
            sliding_window=spec.sliding_window,
            softcap=spec.softcap,
        )
        self._attention = PagedAttention(shape)
        self._as_nhd = self.capabilities.kv_layout.as_nhd

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> CpuMetadata:
        """Cut the step into work items."""
        planned = self._attention.plan(
            cu_seqlens_q=batch.cu_seqlens_q, seq_lens=batch.seq_lens, block_tables=batch.block_tables
        )
        return CpuMetadata(batch=batch, kv_cache=kv_cache, planned=planned)

    @stores_by_slot
    def write(self, k: torch.Tensor, v: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> None:
        """Store this step's keys and values, each `[num_tokens, num_kv_heads, head_dim]`, at the batch's slots."""
        write_kv(k, v, self._as_nhd(cache.keys), self._as_nhd(cache.values), meta.batch.slot_mapping)

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        """Attend as planned: `[num_tokens, num_heads, head_dim]` in and out."""
        return self._planned(meta).run(q, self._as_nhd(cache.keys), self._as_nhd(cache.values))

    def attend_with_sinks(
        self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata, sinks: torch.Tensor
    ) -> torch.Tensor:
        """As `attend`, with one more logit per head in the denominator; `sinks` is `[num_heads]`."""
        return self._planned(meta).run(q, self._as_nhd(cache.keys), self._as_nhd(cache.values), sinks)

    def _planned(self, meta: AttentionMetadata) -> PlannedAttention:
        if not isinstance(meta, CpuMetadata):
            raise TypeError(f"backend cpu was given {type(meta).__name__}; attend takes what its own plan() returned")
        return meta.planned
