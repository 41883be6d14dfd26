"""The shape of a paged KV cache on one rank, and the bytes it costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVCacheSpec:
    """What one rank's cache must hold; `num_kv_heads` counts the heads on this rank."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes for the keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_block(self) -> int:
        """Bytes for the keys and values of one block over all layers."""
        return self.bytes_per_token * self.block_size
