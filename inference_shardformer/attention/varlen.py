"""Backend `varlen`: torch's own variable-length FlashAttention over the paged cache, for machines with torch alone."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

import torch
from pydantic import BaseModel

from inference_shardformer.attention.base import (
    AttentionBackend,
    AttentionCapabilities,
    AttentionMetadata,
    AttentionSpec,
    Feature,
    RaggedBatch,
    Requirement,
    Sizes,
)
from inference_shardformer.attention.captured import captured_batch, refill
from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache


@dataclass(frozen=True)
class VarlenMetadata(AttentionMetadata):
    """The one call of a step."""

    cu_seqlens_k: torch.Tensor  # int32 [num_seqs + 1]; the kernel wants it and reads seq_lens
    max_seqlen_q: int
    max_seqlen_k: int


class VarlenAttention(AttentionBackend):
    """One call of `torch.nn.attention.varlen.varlen_attn` for a whole step.

    The kernels are those of flash-attn 2, so they take blocks of 256 tokens. A context is never cut into parts
    (`num_splits=1`): with a block table, what torch joins from several parts is wrong (pytorch/pytorch#194167). That
    makes a result independent of its company, and one long sequence slow.
    """

    name: ClassVar[str] = "varlen"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[AttentionCapabilities] = AttentionCapabilities(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims=Sizes.multiples_of(8, high=256),
        block_sizes=Sizes.multiples_of(256),
        features=frozenset({Feature.CHUNKED_PREFILL, Feature.MIXED_BATCH, Feature.SLIDING_WINDOW, Feature.GRAPHS}),
    )
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement(
            "torch.nn.attention.varlen",
            "install torch 2.13 or newer: earlier ones have no block tables in varlen_attn",
            distribution="torch",
            min_version="2.13",
            names=("varlen_attn",),
            platforms=("cuda",),
            min_capability=(8, 0),
        ),
    )

    def __init__(self, spec: AttentionSpec, options: BaseModel | None = None) -> None:
        super().__init__(spec, options)
        self._varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
        # (-1, 0) is causal; the left edge does not count the query itself.
        self._window = (-1 if spec.sliding_window is None else spec.sliding_window - 1, 0)

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> VarlenMetadata:
        """Sum the lengths up; nothing waits for the device."""
        return VarlenMetadata(
            batch=batch,
            kv_cache=kv_cache,
            cu_seqlens_k=_starts(batch.seq_lens),
            max_seqlen_q=max(batch.host_query_lens, default=0),
            max_seqlen_k=max(batch.host_seq_lens, default=0),
        )

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        """Attend in one call: `[num_tokens, num_heads, head_dim]` in and out."""
        if not isinstance(meta, VarlenMetadata):
            raise TypeError(
                f"backend varlen was given {type(meta).__name__}; attend takes what its own plan() returned"
            )
        if not len(q):
            return torch.empty_like(q)
        out: torch.Tensor = self._varlen_attn(
            q,
            cache.keys,
            cache.values,
            meta.batch.cu_seqlens_q,
            meta.cu_seqlens_k,
            meta.max_seqlen_q,
            meta.max_seqlen_k,
            scale=self.spec.scale,
            window_size=self._window,
            enable_gqa=self.spec.num_heads != self.spec.num_kv_heads,
            seqused_k=meta.batch.seq_lens,
            block_table=meta.batch.block_tables,
            num_splits=1,
        )
        return out

    def plan_capture(self, num_decodes: int, kv_cache: PagedKVCache) -> VarlenMetadata:
        """A plan for sequences as long as the cache: its kernel is started for the longest that may come."""
        batch = captured_batch(num_decodes, kv_cache, self.spec.device)
        longest = kv_cache.num_blocks * self.spec.block_size
        return VarlenMetadata(batch, kv_cache, _starts(batch.seq_lens), max_seqlen_q=1, max_seqlen_k=longest)

    def replan(self, batch: RaggedBatch, meta: AttentionMetadata) -> None:
        """Refill the captured plan."""
        if not isinstance(meta, VarlenMetadata):
            raise TypeError(
                f"backend varlen was given {type(meta).__name__}; replan takes what plan_capture() returned"
            )
        refill(meta.batch, batch)
        torch.cumsum(batch.seq_lens, 0, dtype=torch.int32, out=meta.cu_seqlens_k[1:])


def _starts(seq_lens: torch.Tensor) -> torch.Tensor:
    """Where each sequence's keys would begin if they were packed; int32 `[num_seqs + 1]`."""
    starts = seq_lens.new_zeros(len(seq_lens) + 1)
    torch.cumsum(seq_lens, 0, dtype=torch.int32, out=starts[1:])
    return starts
