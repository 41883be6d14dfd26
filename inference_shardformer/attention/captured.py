"""The batch of a captured decode step: tensors that keep their addresses and are refilled before every replay."""

from __future__ import annotations

import torch

from inference_shardformer.attention.base import RaggedBatch
from inference_shardformer.kv_cache.cache import PagedKVCache


def captured_batch(num_decodes: int, kv_cache: PagedKVCache, device: torch.device) -> RaggedBatch:
    """A batch of `num_decodes` sequences of one token each, all of them in block 0, to capture a step with.

    A sequence may own every block of the cache, so its row of the block table has room for all of them.
    """
    return RaggedBatch(
        cu_seqlens_q=torch.arange(num_decodes + 1, dtype=torch.int32, device=device),
        seq_lens=torch.ones(num_decodes, dtype=torch.int32, device=device),
        block_tables=torch.zeros(num_decodes, kv_cache.num_blocks, dtype=torch.int32, device=device),
        slot_mapping=torch.zeros(num_decodes, dtype=torch.int64, device=device),
        host_query_lens=[1] * num_decodes,
        host_seq_lens=[1] * num_decodes,
        num_decodes=num_decodes,
    )


def refill(captured: RaggedBatch, batch: RaggedBatch) -> None:
    """Copy `batch`, as many decodes, into `captured`. Entries of the block table that it does not have stay."""
    captured.seq_lens.copy_(batch.seq_lens, non_blocking=True)
    captured.slot_mapping.copy_(batch.slot_mapping, non_blocking=True)
    captured.block_tables[:, : batch.block_tables.shape[1]].copy_(batch.block_tables, non_blocking=True)
