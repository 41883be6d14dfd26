"""The tensors of the paged KV cache; which block belongs to whom is the allocator's job."""

from __future__ import annotations

from typing import NamedTuple

import torch

from inference_shardformer.errors import CapacityError
from inference_shardformer.kv_cache.spec import KVCacheSpec


class LayerKVCache(NamedTuple):
    """Keys and values of one layer, each `[num_blocks, block_size, num_kv_heads, head_dim]`."""

    keys: torch.Tensor
    values: torch.Tensor


class PagedKVCache:
    """Keys and values of every layer of one rank, cut into blocks of `block_size` tokens.

    A token's slot is `block_id * block_size + offset`; slots index the first two axes flattened.
    Memory is zero-filled and, on a CPU, touched by the system only when written.
    """

    def __init__(self, spec: KVCacheSpec, *, num_blocks: int, device: torch.device) -> None:
        if num_blocks < 1:
            raise CapacityError(
                f"num_blocks={num_blocks}: the cache needs at least one block of {spec.bytes_per_block} bytes",
                remedy="free memory, raise cache.memory_limit, or lower cache.block_size",
            )
        self.spec = spec
        self.num_blocks = num_blocks
        shape = (spec.num_layers, num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        keys = torch.zeros(shape, dtype=spec.dtype, device=device)
        values = torch.zeros(shape, dtype=spec.dtype, device=device)
        self._layers = tuple(LayerKVCache(keys[i], values[i]) for i in range(spec.num_layers))

    def layer(self, layer_idx: int) -> LayerKVCache:
        """Keys and values of one layer, as views into the cache."""
        return self._layers[layer_idx]

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values on this rank."""
        return self.num_blocks * self.spec.bytes_per_block
