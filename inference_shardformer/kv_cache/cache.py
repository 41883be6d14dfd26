"""The tensors of the paged KV cache; which block belongs to whom is the allocator's job."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from inference_shardformer.errors import CapacityError
from inference_shardformer.kernels.e4m3 import gather_rows, store_rows
from inference_shardformer.kernels.host_memory import zeroed_bytes
from inference_shardformer.kv_cache.layout import KVLayout
from inference_shardformer.kv_cache.spec import KVCacheSpec


class LayerKVCache(NamedTuple):
    """Keys and values of one layer, each `[num_blocks, block_size, num_kv_heads, head_dim]` in the layout NHD."""

    keys: torch.Tensor
    values: torch.Tensor


class PagedKVCache:
    """Keys and values of every layer of one rank, cut into blocks of `block_size` tokens.

    A token's slot is `block_id * block_size + offset`; in the layout NHD slots index the first two axes flattened.
    `layouts` has that of each layer. Memory is zero-filled and, on a CPU, touched by the system only when written.
    """

    def __init__(
        self,
        spec: KVCacheSpec,
        *,
        num_blocks: int,
        device: torch.device,
        layout: KVLayout | Sequence[KVLayout] = KVLayout.NHD,
    ) -> None:
        """`layout` is that of every layer, or one for each of them."""
        if num_blocks < 1:
            raise CapacityError(
                f"num_blocks={num_blocks}: the cache needs at least one block of {spec.bytes_per_block} bytes",
                remedy="free memory, raise cache.memory_limit, or lower cache.block_size",
            )
        self.spec = spec
        self.num_blocks = num_blocks
        self.layouts = (layout,) * spec.num_layers if isinstance(layout, KVLayout) else tuple(layout)
        self._device = device
        shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        keys, values = (_zeros((spec.num_layers, *shape), spec.dtype, device) for _ in range(2))
        self._layers = tuple(
            LayerKVCache(keys[i].view(own.arrange(shape)), values[i].view(own.arrange(shape)))
            for i, own in enumerate(self.layouts)
        )

    def layer(self, layer_idx: int) -> LayerKVCache:
        """Keys and values of one layer, as views into the cache."""
        return self._layers[layer_idx]

    def layer_as_nhd(self, layer_idx: int) -> LayerKVCache:
        """The same as `[num_blocks, block_size, num_kv_heads, head_dim]`, whatever the layer's layout is."""
        own = self.layouts[layer_idx]
        return LayerKVCache(*map(own.as_nhd, self._layers[layer_idx]))

    def converted(self, layout: KVLayout | Sequence[KVLayout], block_ids: Sequence[int]) -> PagedKVCache:
        """A new cache of the same size in other layouts, with the contents of these blocks; all else is zero.

        Both exist until one is let go. Blocks that are left out are never touched, so they cost no memory on a CPU.
        Raises CapacityError if there is no room for it.
        """
        try:
            target = PagedKVCache(self.spec, num_blocks=self.num_blocks, device=self._device, layout=layout)
        except (RuntimeError, MemoryError) as exc:  # what torch raises for memory differs by device and version
            raise CapacityError(
                f"a second cache of {self.num_bytes} bytes, in another layout, cannot be allocated: {exc}",
                remedy="lower cache.num_blocks or cache.memory_limit, so that two caches fit while one is converted",
            ) from exc
        blocks = torch.tensor(block_ids, dtype=torch.int64, device=self._device)
        for layer_idx, (old, new) in enumerate(zip(self.layouts, target.layouts, strict=True)):
            for source, copy in zip(self._layers[layer_idx], target._layers[layer_idx], strict=True):
                store_rows(new.as_nhd(copy), blocks, gather_rows(old.as_nhd(source), blocks, source.dtype))
        return target

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values on this rank."""
        return self.num_blocks * self.spec.bytes_per_block


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return zeroed_bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
