"""An attention backend that takes long prompts a few queries at a time, so that its scores stay small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from inference_shardformer.attention.base import (
    AttentionBackend,
    AttentionCapabilities,
    AttentionMetadata,
    AttentionSpec,
    Feature,
    RaggedBatch,
)
from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache


class ChunkedOptions(BaseModel):
    """What a user may set under `inference.attention.options.chunked`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chunk_size: int = Field(default=128, ge=1, description="Queries whose scores are held at once.")


class Chunk(NamedTuple):
    """Queries of one sequence and the keys that they may see."""

    tokens: slice  # place of the queries in the packed tokens
    slots: torch.Tensor  # int64 [num_keys], places of the keys in the cache
    visible: torch.Tensor  # bool [num_queries, num_keys]


@dataclass(frozen=True)
class ChunkedMetadata(AttentionMetadata):
    """The chunks of one step, for all layers."""

    chunks: tuple[Chunk, ...]


class ChunkedAttention(AttentionBackend):
    """Softmax attention in plain torch, at most `chunk_size` queries at a time."""

    name: ClassVar[str] = "chunked"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[AttentionCapabilities] = AttentionCapabilities(
        devices=("cpu", "cuda"),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        features=frozenset({Feature.CHUNKED_PREFILL, Feature.MIXED_BATCH, Feature.SLIDING_WINDOW}),
    )
    Options: ClassVar[type[BaseModel]] = ChunkedOptions

    def __init__(self, spec: AttentionSpec, options: ChunkedOptions) -> None:
        super().__init__(spec, options)
        self.chunk_size = options.chunk_size

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> ChunkedMetadata:
        """Cut every sequence into chunks, once a step."""
        chunks, start = [], 0
        for seq, query_len in enumerate(batch.host_query_lens):
            for first in range(0, query_len, self.chunk_size):
                size = min(self.chunk_size, query_len - first)
                position = batch.host_seq_lens[seq] - query_len + first
                chunks.append(self._chunk(batch.block_tables[seq], start + first, size, position))
            start += query_len
        return ChunkedMetadata(batch=batch, kv_cache=kv_cache, chunks=tuple(chunks))

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: ChunkedMetadata) -> torch.Tensor:
        """`[num_tokens, num_heads, head_dim]` in and out."""
        keys, values = cache.keys.flatten(0, 1), cache.values.flatten(0, 1)  # [num_slots, num_kv_heads, head_dim]
        out = torch.empty_like(q)
        for tokens, slots, visible in meta.chunks:
            queries = q[tokens].unflatten(1, (self.spec.num_kv_heads, -1)).float()
            scores = torch.einsum("qhgd,khd->hgqk", queries, keys[slots].float()) * self.spec.scale
            weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
            out[tokens] = torch.einsum("hgqk,khd->qhgd", weights, values[slots].float()).flatten(1, 2).to(q.dtype)
        return out

    def _chunk(self, block_table: torch.Tensor, start: int, size: int, position: int) -> Chunk:
        """`size` queries of one sequence, of which the first stands at `position`."""
        window = self.spec.sliding_window or position + size
        keys = torch.arange(max(0, position - window + 1), position + size, device=self.spec.device)
        queries = torch.arange(position, position + size, device=self.spec.device)[:, None]
        slots = block_table.long()[keys // self.spec.block_size] * self.spec.block_size + keys % self.spec.block_size
        return Chunk(slice(start, start + size), slots, (keys <= queries) & (keys > queries - window))
