"""SoundAttention: a plug-in as its author would write it, in steps that the animals of the zoo break one at a time."""

from __future__ import annotations

from typing import ClassVar

import torch

from inference_shardformer.attention.base import (
    AttentionBackend,
    AttentionCapabilities,
    AttentionMetadata,
    Feature,
    RaggedBatch,
    Sizes,
)
from inference_shardformer.kv_cache.cache import LayerKVCache, PagedKVCache


class SoundAttention(AttentionBackend):
    """One sequence at a time, in fp32. Nothing is wrong with it."""

    name: ClassVar[str] = "sound"
    contract_version: ClassVar[int] = 1
    capabilities: ClassVar[AttentionCapabilities] = AttentionCapabilities(
        devices=("cpu",),
        dtypes=(torch.float32, torch.bfloat16),
        head_dims=Sizes.only(16, 32),
        block_sizes=Sizes.only(4, 16),
        gqa_ratios=Sizes.only(1, 2, 4),
        features=frozenset(
            {Feature.CHUNKED_PREFILL, Feature.MIXED_BATCH, Feature.SLIDING_WINDOW, Feature.SOFTCAP, Feature.SINKS}
        ),
    )

    def plan(self, batch: RaggedBatch, kv_cache: PagedKVCache) -> AttentionMetadata:
        return AttentionMetadata(batch=batch, kv_cache=kv_cache)

    def attend(self, q: torch.Tensor, cache: LayerKVCache, meta: AttentionMetadata) -> torch.Tensor:
        return self.attend_all(q, cache, meta, None)

    def attend_with_sinks(self, q, cache, meta, sinks):
        return self.attend_all(q, cache, meta, sinks)

    def attend_all(self, q, cache, meta, sinks):
        out, start = torch.empty_like(q), 0
        for seq, query_len in enumerate(meta.batch.host_query_lens):
            tokens = slice(start, start + query_len)
            out[tokens] = self.attend_one(q[tokens], cache, meta, seq, sinks).to(q.dtype)
            start += query_len
        return out

    def attend_one(self, q, cache, meta, seq, sinks):
        """One sequence: `[query_len, num_heads, head_dim]` in, in fp32 out."""
        keys, values = self.gather(cache, meta.batch, seq)
        owner = self.owner(q.shape[1])
        scores = torch.einsum("qhd,khd->hqk", q.float(), keys[:, owner].float())
        seq_len = meta.batch.host_seq_lens[seq]
        visible = self.visible(torch.arange(seq_len - len(q), seq_len)[:, None], torch.arange(len(keys)))
        weights = self.softmax(self.scaled(scores), visible, sinks)
        return torch.einsum("hqk,khd->qhd", weights, values[:, owner].float())

    def gather(self, cache, batch, seq):
        """Keys and values in order of position, `[seq_len, num_kv_heads, head_dim]` each."""
        slots = self.slots(batch, seq, torch.arange(batch.host_seq_lens[seq]))
        return cache.keys.flatten(0, 1)[slots], cache.values.flatten(0, 1)[slots]

    def slots(self, batch, seq, positions):
        size = self.spec.block_size
        return batch.block_tables[seq].long()[positions // size] * size + positions % size

    def owner(self, num_heads):
        """The key head of each query head."""
        return [head // (num_heads // self.spec.num_kv_heads) for head in range(num_heads)]

    def visible(self, queries, keys):
        """Which positions a query at a position sees."""
        window = self.spec.sliding_window
        causal = keys <= queries
        return causal if window is None else causal & (keys > queries - window)

    def scaled(self, scores):
        scores, cap = scores * self.spec.scale, self.spec.softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def softmax(self, scores, visible, sinks):
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is None:
            return scores.softmax(dim=-1)
        column = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        return torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]
