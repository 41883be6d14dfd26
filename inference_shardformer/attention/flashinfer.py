"""Backend `flashinfer`: the FlashInfer library's wrappers, planned once a step from lengths that the host knows."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool

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
from inference_shardformer.attention.flashinfer_pages import Pages, pages_of
from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache

_WORKSPACE_BYTES = 128 << 20  # what the library recommends for the partial results of split contexts
_REMEDY = (
    "pip install 'inference-shardformer[flashinfer]'; its kernels are compiled at their first use, which takes nvcc "
    "and minutes, unless the wheel flashinfer-jit-cache of this CUDA is installed too"
)


class FlashInferOptions(BaseModel):
    """Options of `flashinfer`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split_kv: StrictBool = Field(
        default=True,
        description="Cut long contexts into parts; false: never, so that a result does not depend on its company by a "
        "single bit.",
    )


class Wrapper(Protocol):
    """What the two wrappers of the library have in common."""

    def run(self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Attend as planned last."""


@dataclass(frozen=True)
class FlashInferMetadata(AttentionMetadata):
    """At most two calls for a step. The wrappers keep the plan of one step at a time, `serial` says of which."""

    decodes: Wrapper | None
    prompts: Wrapper | None
    serial: int


class FlashInferAttention(AttentionBackend):
    """One wrapper for the decodes of a step and one for the rest; captured decodes have wrappers of their own."""

    name: ClassVar[str] = "flashinfer"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[AttentionCapabilities] = AttentionCapabilities(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        head_dims=Sizes.only(64, 128, 256),
        features=frozenset(Feature) - {Feature.SINKS},
    )
    Options: ClassVar[type[BaseModel] | None] = FlashInferOptions
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement(
            "flashinfer",
            _REMEDY,
            distribution="flashinfer-python",
            min_version="0.3",
            names=("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"),
            platforms=("cuda",),
            min_capability=(8, 0),
        ),
    )

    def __init__(self, spec: AttentionSpec, options: BaseModel | None = None) -> None:
        super().__init__(spec, options)
        self._library = import_module("flashinfer")
        self._splits = options.split_kv if isinstance(options, FlashInferOptions) else True
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=spec.device)
        # The tensor-core path serves every number of query heads per key head, the other one only a few.
        self._decodes = self._library.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "NHD", use_tensor_cores=True)
        self._prompts = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
        self._serial = 0

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> FlashInferMetadata:
        """Let the library divide the work; nothing waits for the device."""
        self._serial += 1
        count, total = batch.num_decodes, batch.num_seqs
        if count:
            self._plan_decodes(self._decodes, pages_of(batch, 0, count, self.spec.block_size))
        if total > count:
            self._plan_prompts(batch, pages_of(batch, count, total, self.spec.block_size))
        return FlashInferMetadata(
            batch, kv_cache, self._decodes if count else None, self._prompts if total > count else None, self._serial
        )

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        """Attend as planned: `[num_tokens, num_heads, head_dim]` in and out."""
        own = self._own(meta)
        pages = (cache.keys, cache.values)
        count = own.batch.num_decodes
        if own.prompts is None:
            return torch.empty_like(q) if own.decodes is None else own.decodes.run(q, pages)
        if own.decodes is None:
            return own.prompts.run(q, pages)
        return torch.cat([own.decodes.run(q[:count], pages), own.prompts.run(q[count:], pages)])

    def plan_capture(self, num_decodes: int, kv_cache: PagedKVCache) -> FlashInferMetadata:
        """A wrapper for so many decodes whose buffers keep their addresses."""
        device = self.spec.device
        wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=torch.zeros(num_decodes + 1, dtype=torch.int32, device=device),
            paged_kv_indices_buffer=torch.zeros(num_decodes * kv_cache.num_blocks, dtype=torch.int32, device=device),
            paged_kv_last_page_len_buffer=torch.ones(num_decodes, dtype=torch.int32, device=device),
        )
        batch = captured_batch(num_decodes, kv_cache, device)
        self._plan_decodes(wrapper, pages_of(batch, 0, num_decodes, self.spec.block_size))
        return FlashInferMetadata(batch, kv_cache, wrapper, None, serial=0)

    def replan(self, batch: RaggedBatch, meta: AttentionMetadata) -> None:
        """Refill the captured plan and its wrapper's buffers."""
        own = self._own(meta)
        refill(own.batch, batch)
        self._plan_decodes(own.decodes, pages_of(batch, 0, batch.num_decodes, self.spec.block_size))

    def _plan_decodes(self, wrapper: object, pages: Pages) -> None:
        wrapper.plan(  # type: ignore[attr-defined]
            pages.indptr,
            pages.indices,
            pages.last_page_len,
            self.spec.num_heads,
            self.spec.num_kv_heads,
            self.spec.head_dim,
            self.spec.block_size,
            **self._shared(),
        )

    def _plan_prompts(self, batch: RaggedBatch, pages: Pages) -> None:
        starts = torch.tensor([0, *batch.host_query_lens[batch.num_decodes :]]).cumsum(0).int()
        self._prompts.plan(
            starts,
            pages.indptr,
            pages.indices,
            pages.last_page_len,
            self.spec.num_heads,
            self.spec.num_kv_heads,
            self.spec.head_dim,
            self.spec.block_size,
            causal=True,
            **self._shared(),
        )

    def _shared(self) -> dict[str, object]:
        """Arguments of both plans."""
        window = self.spec.sliding_window
        return {
            "window_left": -1 if window is None else window - 1,  # the query itself does not count
            "logits_soft_cap": self.spec.softcap,
            "sm_scale": self.spec.scale,
            "q_data_type": self.spec.dtype,
            "kv_data_type": self.spec.cache_dtype,
            "disable_split_kv": not self._splits,
        }

    def _own(self, meta: AttentionMetadata) -> FlashInferMetadata:
        if not isinstance(meta, FlashInferMetadata):
            raise TypeError(
                f"backend flashinfer was given {type(meta).__name__}; it takes what its own plan() returned"
            )
        if meta.serial not in (0, self._serial):
            raise TypeError("backend flashinfer was given the plan of an earlier step; its wrappers keep the last one")
        return meta
