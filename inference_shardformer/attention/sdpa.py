"""Backend `sdpa`: paged, ragged, grouped-query attention through torch's scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from inference_shardformer.attention.base import (
    AttentionBackend,
    AttentionCapabilities,
    AttentionMetadata,
    Feature,
    RaggedBatch,
)
from inference_shardformer.attention.requirements import FLOAT_DTYPES
from inference_shardformer.attention.sdpa_plan import (
    DecodeGroup,
    DecodePlan,
    PrefillCall,
    plan_decodes,
    plan_prefills,
)
from inference_shardformer.kernels.e4m3 import gather_rows
from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache


@dataclass(frozen=True)
class SdpaMetadata(AttentionMetadata):
    """The SDPA calls of one step."""

    decodes: DecodePlan | None
    prefills: tuple[PrefillCall, ...]


class SdpaAttention(AttentionBackend):
    """One SDPA call for each group of decoding sequences of similar length, one for each prefilling sequence."""

    name: ClassVar[str] = "sdpa"
    contract_version: ClassVar[int] = 1
    # SDPA takes a mask but no cap on the scores, and no sinks.
    capabilities: ClassVar[AttentionCapabilities] = AttentionCapabilities(
        devices=("cpu", "cuda"),
        dtypes=FLOAT_DTYPES,
        kv_dtypes=(torch.float8_e4m3fn,),
        features=frozenset({Feature.CHUNKED_PREFILL, Feature.MIXED_BATCH, Feature.SLIDING_WINDOW}),
    )

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> SdpaMetadata:
        """Lay out every call of the step, with its slots and its mask."""
        decodes = plan_decodes(batch, self.spec)
        prefills = plan_prefills(batch, self.spec)
        return SdpaMetadata(batch=batch, kv_cache=kv_cache, decodes=decodes, prefills=prefills)

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        """Attend as planned: `[num_tokens, num_heads, head_dim]` in and out."""
        if not isinstance(meta, SdpaMetadata):
            raise TypeError(f"backend sdpa was given {type(meta).__name__}; attend takes what its own plan() returned")
        grouped = q.unflatten(1, (self.spec.num_kv_heads, -1))  # [num_tokens, num_kv_heads, group, head_dim]
        keys, values = cache.keys.flatten(0, 1), cache.values.flatten(0, 1)  # [num_slots, num_kv_heads, head_dim]
        parts = [self._prefill(grouped[call.tokens], keys, values, call) for call in meta.prefills]
        if meta.decodes is not None:
            parts.insert(0, self._decode(grouped[: meta.batch.num_decodes], keys, values, meta.decodes))
        return _joined(parts).reshape(q.shape) if parts else torch.empty_like(q)

    def _decode(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
        """All decoding sequences, `[num_decodes, num_kv_heads, group, head_dim]` in and out."""
        queries = q if plan.order is None else q.index_select(0, plan.order)
        out = _joined([self._decode_group(queries[group.rows], keys, values, group) for group in plan.groups])
        return out if plan.inverse is None else out.index_select(0, plan.inverse)

    def _decode_group(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: DecodeGroup
    ) -> torch.Tensor:
        """The query heads of a key head stand on the query axis: they see the same keys, so no key is repeated."""
        shape = (len(q), group.num_keys, *keys.shape[1:])  # both become [num_seqs, num_kv_heads, num_keys, head_dim]
        k = gather_rows(keys, group.slots, q.dtype).view(shape).transpose(1, 2)
        v = gather_rows(values, group.slots, q.dtype).view(shape).transpose(1, 2)
        return scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=self.spec.scale)

    def _prefill(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: PrefillCall) -> torch.Tensor:
        """One sequence. Key heads stand on the batch axis, so that they are broadcast over the heads, not copied."""
        queries = q.permute(1, 2, 0, 3)  # [num_kv_heads, group, query_len, head_dim]
        shape = (*queries.shape[:2], len(call.slots), q.shape[3])
        k = gather_rows(keys, call.slots, q.dtype).transpose(0, 1)[:, None].expand(shape)
        v = gather_rows(values, call.slots, q.dtype).transpose(0, 1)[:, None].expand(shape)
        out = scaled_dot_product_attention(
            queries, k, v, attn_mask=call.mask, is_causal=call.mask is None, scale=self.spec.scale
        )
        return out.permute(2, 0, 1, 3)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The parts behind each other, without a copy if there is only one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
