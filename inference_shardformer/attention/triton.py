"""Backend `triton`: our own kernels in Triton, for every shape and feature; decode steps can be captured."""

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
    RaggedBatch,
    Requirement,
    Sizes,
    stores_by_slot,
)
from inference_shardformer.attention.captured import captured_batch, refill
from inference_shardformer.attention.requirements import FLOAT_DTYPES
from inference_shardformer.kernels.triton.requirement import TRITON
from inference_shardformer.kernels.triton.shapes import MAX_HEAD_DIM, AttentionShape, DecodeWorkspace
from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache


@dataclass(frozen=True)
class TritonMetadata(AttentionMetadata):
    """The batch and where decodes keep what is joined later; the tensors of a captured one never move."""

    workspace: DecodeWorkspace | None  # None: there are no decodes


class TritonAttention(AttentionBackend):
    """Prefill in tiles of packed query heads; decode cut along the context into pieces that are joined afterwards.

    Pieces follow from a sequence's length alone, so its result is the same alone and in company. Planning reads the
    lengths on the host and waits for nothing; grids follow from counts, so that a captured step serves all lengths.
    """

    name: ClassVar[str] = "triton"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[AttentionCapabilities] = AttentionCapabilities(
        devices=("cuda",),
        dtypes=FLOAT_DTYPES,
        kv_dtypes=(torch.float8_e4m3fn,),
        head_dims=Sizes(high=MAX_HEAD_DIM),
        features=frozenset(Feature),
    )
    requires: ClassVar[tuple[Requirement, ...]] = (Requirement(**TRITON),)

    def __init__(self, spec: AttentionSpec, options: BaseModel | None = None) -> None:
        from inference_shardformer.kernels.triton import paged_attention, write_kv  # they import Triton

        super().__init__(spec, options)
        shape = AttentionShape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            block_size=spec.block_size,
            dtype=spec.dtype,
            kv_dtype=spec.cache_dtype,
            scale=spec.scale,
            sliding_window=spec.sliding_window,
            softcap=spec.softcap,
        )
        self._attention = paged_attention.PagedAttention(shape, spec.device)
        self._write_kv = write_kv.write_kv

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> TritonMetadata:
        """Room for the pieces of the decodes."""
        lens = batch.host_seq_lens[: batch.num_decodes]
        workspace = self._attention.workspace(batch.num_decodes, lens) if batch.num_decodes else None
        return TritonMetadata(batch=batch, kv_cache=kv_cache, workspace=workspace)

    @stores_by_slot
    def write(self, k: torch.Tensor, v: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> None:
        """Store this step's keys and values, each `[num_tokens, num_kv_heads, head_dim]`, at the batch's slots."""
        self._write_kv(k, v, cache.keys, cache.values, meta.batch.slot_mapping)

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        """Attend as planned: `[num_tokens, num_heads, head_dim]` in and out."""
        return self._attend(q, cache, meta, None)

    def attend_with_sinks(
        self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata, sinks: torch.Tensor
    ) -> torch.Tensor:
        """As `attend`, with one more logit per head in the denominator; `sinks` is `[num_heads]`."""
        return self._attend(q, cache, meta, sinks)

    def plan_capture(self, num_decodes: int, kv_cache: PagedKVCache) -> TritonMetadata:
        """Metadata to capture a step of `num_decodes` decodes with, of any length."""
        batch = captured_batch(num_decodes, kv_cache, self.spec.device)
        return TritonMetadata(
            batch=batch, kv_cache=kv_cache, workspace=self._attention.workspace(num_decodes, seq_lens=None)
        )

    def replan(self, batch: RaggedBatch, meta: AttentionMetadata) -> None:
        """Refill a captured batch in place; the kernels read the rest from it."""
        refill(meta.batch, batch)

    def _attend(
        self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        if not isinstance(meta, TritonMetadata):
            raise TypeError(
                f"backend triton was given {type(meta).__name__}; attend takes what its own plan() returned"
            )
        return self._attention.run(q, cache.keys, cache.values, meta.batch, meta.workspace, sinks)
