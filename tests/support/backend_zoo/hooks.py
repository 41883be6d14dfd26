"""Backends with captured plans: one that is right, and broken ones."""

from __future__ import annotations

from dataclasses import replace

import torch

from backend_zoo.sound import SoundAttention
from inference_shardformer.attention.base import AttentionMetadata, Feature, RaggedBatch


def blank_batch(num_decodes: int, max_blocks: int) -> RaggedBatch:
    """Static tensors for a batch of decodes."""
    return RaggedBatch(
        cu_seqlens_q=torch.arange(num_decodes + 1, dtype=torch.int32),
        seq_lens=torch.ones(num_decodes, dtype=torch.int32),
        block_tables=torch.zeros(num_decodes, max_blocks, dtype=torch.int32),
        slot_mapping=torch.zeros(num_decodes, dtype=torch.int64),
        host_query_lens=[1] * num_decodes,
        host_seq_lens=[1] * num_decodes,
        num_decodes=num_decodes,
    )


class SoundGraphs(SoundAttention):
    """Copies each batch into the tensors of the captured plan."""

    name = "sound_graphs"
    capabilities = replace(
        SoundAttention.capabilities, features=SoundAttention.capabilities.features | {Feature.GRAPHS}
    )

    def plan_capture(self, num_decodes, kv_cache):
        return AttentionMetadata(blank_batch(num_decodes, kv_cache.num_blocks), kv_cache)

    def replan(self, batch, meta):
        static = meta.batch
        static.seq_lens.copy_(batch.seq_lens)
        static.slot_mapping.copy_(batch.slot_mapping)
        static.block_tables.zero_()[:, : batch.block_tables.shape[1]] = batch.block_tables
        static.host_seq_lens[:] = batch.host_seq_lens


class ForgetsToRefill(SoundGraphs):
    """Refills the block table and forgets the lengths."""

    name = "forgets_to_refill"

    def replan(self, batch, meta):
        lengths = list(meta.batch.host_seq_lens)
        super().replan(batch, meta)
        meta.batch.host_seq_lens[:] = lengths


class MovesTheTables(SoundGraphs):
    """Puts a new table in the place of the captured one."""

    name = "moves_the_tables"

    def replan(self, batch, meta):
        super().replan(batch, meta)
        object.__setattr__(meta.batch, "block_tables", meta.batch.block_tables.clone())
