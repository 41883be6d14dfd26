"""Backend `flash_attn`: the flash-attn 2 package; decodes with a split context, prompts in one ragged call."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt

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

_REMEDY = (
    "install the wheel of flash-attn's release page for this Python, torch and CUDA (`pip install "
    "'inference-shardformer[flash-attn]' --no-build-isolation` looks for it); where none fits, build the forward "
    "kernels of one architecture alone, docs/gpu.md has the switches"
)


class FlashAttnOptions(BaseModel):
    """Options of `flash_attn`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_splits: StrictInt = Field(
        default=0,
        ge=0,
        le=128,
        description="Parts that the context of a decode is cut into; 0: as the library thinks best for the batch, "
        "1: never, so that a result does not depend on its company by a single bit.",
    )


@dataclass(frozen=True)
class Prompts:
    """The sequences after the decodes, packed for one call."""

    cu_seqlens_q: torch.Tensor  # int32 [num_prompts + 1]
    cu_seqlens_k: torch.Tensor  # int32 [num_prompts + 1], sums of seq_lens
    max_seqlen_q: int
    max_seqlen_k: int
    block_tables: torch.Tensor  # int32 [num_prompts, max_blocks]


@dataclass(frozen=True)
class Decodes:
    """The leading sequences, one query each."""

    seq_lens: torch.Tensor  # int32 [num_decodes]
    block_tables: torch.Tensor  # int32 [num_decodes, max_blocks]


@dataclass(frozen=True)
class FlashAttnMetadata(AttentionMetadata):
    """At most two calls for a step."""

    decodes: Decodes | None
    prompts: Prompts | None


class FlashAttnAttention(AttentionBackend):
    """`flash_attn_with_kvcache` for the decodes of a step, `flash_attn_varlen_func` for the rest."""

    name: ClassVar[str] = "flash_attn"
    contract_version: ClassVar[int] = 1
    # Other head dimensions are padded by the library, which would copy the whole cache in every call.
    capabilities: ClassVar[AttentionCapabilities] = AttentionCapabilities(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims=Sizes.multiples_of(8, high=256),
        block_sizes=Sizes.multiples_of(256),
        features=frozenset(Feature) - {Feature.SINKS},
    )
    Options: ClassVar[type[BaseModel] | None] = FlashAttnOptions
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement(
            "flash_attn",
            _REMEDY,
            distribution="flash-attn",
            min_version="2.6",  # the first with softcap beside block tables
            names=("flash_attn_varlen_func", "flash_attn_with_kvcache"),
            platforms=("cuda",),
            min_capability=(8, 0),
        ),
    )

    def __init__(self, spec: AttentionSpec, options: BaseModel | None = None) -> None:
        super().__init__(spec, options)
        library = import_module("flash_attn")
        self._varlen_func = library.flash_attn_varlen_func
        self._with_kvcache = library.flash_attn_with_kvcache
        self._num_splits = options.num_splits if isinstance(options, FlashAttnOptions) else 0
        # The left edge does not count the query itself; without a window, `causal` closes the right one.
        self._window = (-1, -1) if spec.sliding_window is None else (spec.sliding_window - 1, 0)

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> FlashAttnMetadata:
        """Separate decodes from prompts; nothing waits for the device."""
        count = batch.num_decodes
        decodes = Decodes(batch.seq_lens[:count], batch.block_tables[:count]) if count else None
        prompts = _prompts(batch) if batch.num_seqs > count else None
        return FlashAttnMetadata(batch, kv_cache, decodes, prompts)

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        """Attend as planned: `[num_tokens, num_heads, head_dim]` in and out."""
        own = self._own(meta)
        count = meta.batch.num_decodes
        if own.prompts is None:
            return torch.empty_like(q) if own.decodes is None else self._decode(q, cache, own.decodes)
        if own.decodes is None:
            return self._prefill(q, cache, own.prompts)
        return torch.cat([self._decode(q[:count], cache, own.decodes), self._prefill(q[count:], cache, own.prompts)])

    def plan_capture(self, num_decodes: int, kv_cache: PagedKVCache) -> FlashAttnMetadata:
        """A plan of decodes alone, over tensors that `replan` refills."""
        return self.plan(captured_batch(num_decodes, kv_cache, self.spec.device), kv_cache)

    def replan(self, batch: RaggedBatch, meta: AttentionMetadata) -> None:
        """Refill the captured plan, whose tensors are views of its batch."""
        refill(self._own(meta).batch, batch)

    def _decode(self, q: torch.Tensor, cache: LayerKVCache, decodes: Decodes) -> torch.Tensor:
        out: torch.Tensor = self._with_kvcache(
            q.unsqueeze(1),  # [num_decodes, 1, num_heads, head_dim]
            cache.keys,
            cache.values,
            cache_seqlens=decodes.seq_lens,
            block_table=decodes.block_tables,
            softmax_scale=self.spec.scale,
            causal=True,
            window_size=self._window,
            softcap=self.spec.softcap or 0.0,
            num_splits=self._num_splits,
        )
        return out.squeeze(1)

    def _prefill(self, q: torch.Tensor, cache: LayerKVCache, prompts: Prompts) -> torch.Tensor:
        out: torch.Tensor = self._varlen_func(
            q,
            cache.keys,
            cache.values,
            cu_seqlens_q=prompts.cu_seqlens_q,
            cu_seqlens_k=prompts.cu_seqlens_k,
            max_seqlen_q=prompts.max_seqlen_q,
            max_seqlen_k=prompts.max_seqlen_k,
            softmax_scale=self.spec.scale,
            causal=True,
            window_size=self._window,
            softcap=self.spec.softcap or 0.0,
            block_table=prompts.block_tables,
        )
        return out

    def _own(self, meta: AttentionMetadata) -> FlashAttnMetadata:
        if not isinstance(meta, FlashAttnMetadata):
            raise TypeError(
                f"backend flash_attn was given {type(meta).__name__}; it takes what its own plan() returned"
            )
        return meta


def _prompts(batch: RaggedBatch) -> Prompts:
    first = batch.num_decodes
    lens = batch.seq_lens[first:]
    cu_seqlens_k = lens.new_zeros(len(lens) + 1)
    torch.cumsum(lens, 0, dtype=torch.int32, out=cu_seqlens_k[1:])
    return Prompts(
        cu_seqlens_q=batch.cu_seqlens_q[first:] - first if first else batch.cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max(batch.host_query_lens[first:]),
        max_seqlen_k=max(batch.host_seq_lens[first:]),
        block_tables=batch.block_tables[first:],
    )
