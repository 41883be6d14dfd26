"""Backend `flash_attn4`: the flash-attn 4 package, kernels that are compiled at run time for Hopper and Blackwell."""

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
    Reason,
    Requirement,
    Sizes,
)
from inference_shardformer.attention.captured import captured_batch, refill
from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache

_REMEDY = "pip install --pre flash-attn-4 (with the extra cu13 where CUDA is 13)"


@dataclass(frozen=True)
class FlashAttn4Metadata(AttentionMetadata):
    """The one call of a step."""

    max_seqlen_q: int
    max_seqlen_k: int


class FlashAttn4Attention(AttentionBackend):
    """One call of `flash_attn.cute.interface.flash_attn_varlen_func` for a whole step.

    A context is never cut into parts: on Hopper the library cannot, so few long decodes do not fill such a device.
    Blocks are smaller than a tile of keys (64 and more): blocks that hold whole tiles are loaded with their unused
    rows, and a NaN that another sequence left there would spoil the result.
    """

    name: ClassVar[str] = "flash_attn4"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[AttentionCapabilities] = AttentionCapabilities(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims=Sizes.multiples_of(8, high=128),  # 256 on Hopper; 128 is what all its devices have in common
        block_sizes=Sizes(high=63),
        features=frozenset(Feature),
    )
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement(
            "flash_attn.cute.interface",
            _REMEDY,
            distribution="flash-attn-4",
            names=("flash_attn_varlen_func",),
            platforms=("cuda",),
            min_capability=(9, 0),
            max_capability=(11, 9),  # it has no paged cache on 12.0
        ),
    )

    def __init__(self, spec: AttentionSpec, options: BaseModel | None = None) -> None:
        super().__init__(spec, options)
        self._varlen_func = import_module("flash_attn.cute.interface").flash_attn_varlen_func
        self._window = (None, None) if spec.sliding_window is None else (spec.sliding_window - 1, 0)

    @classmethod
    def extra_reasons(cls, spec: AttentionSpec) -> list[Reason]:
        """Sinks and a cap are applied by two mechanisms of which a call takes one."""
        if not (spec.sinks and spec.softcap is not None):
            return []
        message = "attention sinks beside a softcap were never tried with it"
        return [Reason("sinks_with_softcap", message, "use another backend")]

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> FlashAttn4Metadata:
        """The longest query and context."""
        longest_q, longest_k = max(batch.host_query_lens, default=0), max(batch.host_seq_lens, default=0)
        return FlashAttn4Metadata(batch, kv_cache, longest_q, longest_k)

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        """Attend in one call: `[num_tokens, num_heads, head_dim]` in and out."""
        return self._attend(q, cache, meta, None)

    def attend_with_sinks(
        self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata, sinks: torch.Tensor
    ) -> torch.Tensor:
        """As `attend`, with one more logit per head in the denominator; `sinks` is `[num_heads]`."""
        return self._attend(q, cache, meta, sinks)

    def plan_capture(self, num_decodes: int, kv_cache: PagedKVCache) -> FlashAttn4Metadata:
        """A plan for sequences as long as the cache: the library's bounds must cover every replay."""
        batch = captured_batch(num_decodes, kv_cache, self.spec.device)
        return FlashAttn4Metadata(batch, kv_cache, 1, kv_cache.num_blocks * self.spec.block_size)

    def replan(self, batch: RaggedBatch, meta: AttentionMetadata) -> None:
        """Refill the captured plan."""
        refill(self._own(meta).batch, batch)

    def _attend(
        self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        own = self._own(meta)
        if not len(q):
            return torch.empty_like(q)
        out: torch.Tensor = self._varlen_func(
            q,
            cache.keys,
            cache.values,
            cu_seqlens_q=own.batch.cu_seqlens_q,
            max_seqlen_q=own.max_seqlen_q,
            max_seqlen_k=own.max_seqlen_k,
            seqused_k=own.batch.seq_lens,
            page_table=own.batch.block_tables,
            softmax_scale=self.spec.scale,
            causal=True,
            window_size=self._window,
            learnable_sink=sinks,
            softcap=self.spec.softcap or 0.0,
            num_splits=1,
        )
        return out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp beside it

    def _own(self, meta: AttentionMetadata) -> FlashAttn4Metadata:
        if not isinstance(meta, FlashAttn4Metadata):
            raise TypeError(
                f"backend flash_attn4 was given {type(meta).__name__}; it takes what its own plan() returned"
            )
        return meta
