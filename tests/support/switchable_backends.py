"""Backends to switch to: one with another layout of the cache, one with options, some that must not come into use."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from inference_shardformer.attention.base import (
    AttentionBackend,
    AttentionCapabilities,
    AttentionMetadata,
    AttentionSpec,
    KVLayout,
    RaggedBatch,
)
from inference_shardformer.attention.reference import ReferenceAttention
from inference_shardformer.attention.sdpa import SdpaAttention
from inference_shardformer.attention.survey import BackendRegistry, make_registry
from inference_shardformer.kernels import reference as kernels
from inference_shardformer.kernels.cpu.library import native_problem
from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache

SERVING = ("reference", "sdpa", "transposed", *(("cpu",) if native_problem() is None else ()))


class TransposedAttention(AttentionBackend):
    """Keeps the tokens of a head together: `[num_blocks, num_kv_heads, block_size, head_dim]`."""

    name = "transposed"
    contract_version = 1
    capabilities: ClassVar[AttentionCapabilities] = replace(SdpaAttention.capabilities, kv_layout=KVLayout.HND)

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> AttentionMetadata:
        return AttentionMetadata(batch=batch, kv_cache=kv_cache)

    def write(self, k: torch.Tensor, v: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> None:
        slots = meta.batch.slot_mapping
        blocks, offsets = slots // self.spec.block_size, slots % self.spec.block_size
        for new, kept in zip((k, v), cache, strict=True):
            assert kept.shape[1:] == (self.spec.num_kv_heads, self.spec.block_size, self.spec.head_dim)
            kept[blocks, :, offsets] = new

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        keys, values = (kept.transpose(1, 2).contiguous() for kept in cache)
        batch = meta.batch
        return kernels.paged_attention(
            q,
            keys,
            values,
            cu_seqlens_q=batch.cu_seqlens_q,
            seq_lens=batch.seq_lens,
            block_tables=batch.block_tables,
            scale=self.spec.scale,
            sliding_window=self.spec.sliding_window,
        )


class WrongAttention(ReferenceAttention):
    """Is off by a little, which the proof finds."""

    name = "wrong"

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        return super().attend(q, cache, meta) * 1.1


class NarrowAttention(ReferenceAttention):
    """Does not serve fp32."""

    name = "narrow"
    capabilities: ClassVar[AttentionCapabilities] = replace(ReferenceAttention.capabilities, dtypes=(torch.bfloat16,))


class BrokenAttention(ReferenceAttention):
    """Cannot be constructed."""

    name = "broken"

    def __init__(self, spec: AttentionSpec) -> None:
        raise OSError("no such kernel")


class TunableAttention(ReferenceAttention):
    """Takes an option."""

    name = "tunable"

    class Options(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        splits: int = Field(default=1, ge=1)


def switchable_registry() -> BackendRegistry:
    """The built-in backends and those above."""
    registry = make_registry()
    for backend in (TransposedAttention, WrongAttention, NarrowAttention, BrokenAttention, TunableAttention):
        registry.register(backend.name, backend)
    return registry
