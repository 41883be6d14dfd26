"""KVLayout: how the keys, or the values, of one layer lie in memory."""

from __future__ import annotations

from enum import Enum

import torch

_Shape = tuple[int, int, int, int]


class KVLayout(Enum):
    """The order of the axes of one layer's keys and values. A switch between backends of different layouts converts.

    Blocks come first in every layout, so that a block is one piece of memory.
    """

    NHD = "nhd"  # [num_blocks, block_size, num_kv_heads, head_dim]
    HND = "hnd"  # [num_blocks, num_kv_heads, block_size, head_dim]

    def arrange(self, shape: _Shape) -> _Shape:
        """A shape `(num_blocks, block_size, num_kv_heads, head_dim)` in this layout."""
        first, second, third, fourth = (shape[axis] for axis in _AXES[self])
        return first, second, third, fourth

    def as_nhd(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[num_blocks, block_size, num_kv_heads, head_dim]`, a view of a tensor in this layout."""
        return tensor.permute([_AXES[self].index(axis) for axis in range(4)])


# Layout -> which axis of NHD stands at each of its places.
_AXES: dict[KVLayout, _Shape] = {KVLayout.NHD: (0, 1, 2, 3), KVLayout.HND: (0, 2, 1, 3)}
