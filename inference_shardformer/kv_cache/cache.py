"""The tensors of the paged KV cache; which block belongs to whom is the allocator's job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from inference_shardformer.errors import CapacityError
from inference_shardformer.kv_cache.layout import KVLayout
from inference_shardformer.kv_cache.spec import KVCacheSpec


class LayerKVCache(NamedTuple):
    """Keys and values of one layer, each `[num_blocks, block_size, num_kv_heads, head_dim]` in the layout NHD."""

    keys: torch.Tensor
    values: torch.Tensor


class PagedKVCache:
    """Keys and values of every layer of one rank, cut into blocks of `block_size` tokens.

    A token's slot is `block_id * block_size + offset`; in the layout NHD slots index the first two axes flattened.
    Memory is zero-filled and, on a CPU, touched by the system only when written.
    """

    def __init__(
        self, spec: KVCacheSpec, *, num_blocks: int, device: torch.device, layout: KVLayout = KVLayout.NHD
    ) -> None:
        if num_blocks < 1:
            raise CapacityError(
                f"num_blocks={num_blocks}: the cache needs at least one block of {spec.bytes_per_block} bytes",
                remedy="free memory, raise cache.memory_limit, or lower cache.block_size",
            )
        self.spec = spec
        self.num_blocks = num_blocks
        self.layout = layout
        self._device = device
        blocks = layout.arrange((num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim))
        shape = (spec.num_layers, *blocks)
        keys = torch.zeros(shape, dtype=spec.dtype, device=device)
        values = torch.zeros(shape, dtype=spec.dtype, device=device)
        self._layers = tuple(LayerKVCache(keys[i], values[i]) for i in range(spec.num_layers))

    def layer(self, layer_idx: int) -> LayerKVCache:
        """Keys and values of one layer, as views into the cache."""
        return self._layers[layer_idx]

    def converted(self, layout: KVLayout, block_ids: Sequence[int]) -> PagedKVCache:
        """A new cache of the same size in another layout, with the contents of these blocks; all else is zero.

        Both exist until one is let go. Blocks that are left out are never touched, so they cost no memory on a CPU.
        Raises CapacityError if there is no room for it.
        """
        try:
            target = PagedKVCache(self.spec, num_blocks=self.num_blocks, device=self._device, layout=layout)
        except (RuntimeError, MemoryError) as exc:  # what torch raises for memory differs by device and version
            raise CapacityError(
                f"a second cache of {self.num_bytes} bytes, in the layout {layout.value}, cannot be allocated: {exc}",
                remedy="lower cache.num_blocks or cache.memory_limit, so that two caches fit while one is converted",
            ) from exc
        blocks = torch.tensor(block_ids, dtype=torch.int64, device=self._device)
        for old, new in zip(self._layers, target._layers, strict=True):
            for source, copy in zip(old, new, strict=True):
                layout.as_nhd(copy).index_copy_(0, blocks, self.layout.as_nhd(source).index_select(0, blocks))
        return target

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values on this rank."""
        return self.num_blocks * self.spec.bytes_per_block
