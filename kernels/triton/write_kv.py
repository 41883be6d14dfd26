"""The write of keys and values into the paged cache, both in one launch."""

from __future__ import annotations

import torch

from inference_shardformer.kernels.triton.runtime import as_stored, unit_stride
from inference_shardformer.kernels.triton.shapes import power_of_two
from inference_shardformer.kernels.triton.write_kernel import write_kernel


def write_kv(
    k: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim], any strides but the last
    v: torch.Tensor,  # like k
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], changed in place
    v_cache: torch.Tensor,  # like k_cache, changed in place
    slot_mapping: torch.Tensor,  # [num_tokens], slot = block_id * block_size + offset; negative: not stored
) -> None:
    """Store each token's key and value at its slot, in the type of the cache."""
    if not len(k):
        return
    k, v = unit_stride(k), unit_stride(v)
    keys, values = as_stored(k_cache), as_stored(v_cache)
    num_heads, head_dim = k.shape[1:]
    write_kernel[(len(k),)](
        *(k, v, keys, values, slot_mapping, *k.stride()[:2], *v.stride()[:2]),
        *(*keys.stride()[:3], *values.stride()[:3]),
        NUM_HEADS=num_heads,
        HEADS_PAD=power_of_two(num_heads),
        HEAD_DIM=head_dim,
        HEAD_PAD=power_of_two(head_dim),
        BLOCK_SIZE=k_cache.shape[1],
        FP8=keys.dtype is not k_cache.dtype,
    )
