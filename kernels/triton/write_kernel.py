"""Device code: each token's key and value to its slot in the paged cache."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
# Arguments of device code have no types, and Triton 3.1's interpreter reads annotations as they are: no postponing.

import triton
import triton.language as tl

from inference_shardformer.kernels.triton.fp8_kernel import to_e4m3


@triton.jit
def store_cached(pointers, value, mask, FP8: tl.constexpr):
    """Store in the type of the cache; `FP8`: as bytes of e4m3."""
    if FP8:
        tl.store(pointers, to_e4m3(value), mask=mask)
    else:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def write_kernel(
    k_ptr,  # [num_tokens, num_kv_heads, head_dim]
    v_ptr,
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache_ptr,
    slots_ptr,  # [num_tokens]
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    k_block_stride,
    k_slot_stride,
    k_cache_head_stride,
    v_block_stride,
    v_slot_stride,
    v_cache_head_stride,
    NUM_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FP8: tl.constexpr,
):
    """One program: one token, all of its heads. A negative slot: not stored."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    heads = tl.arange(0, HEADS_PAD)[:, None]
    dims = tl.arange(0, HEAD_PAD)[None, :]
    mask = (heads < NUM_HEADS) & (dims < HEAD_DIM)
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    k = tl.load(k_ptr + token * k_token_stride + heads * k_head_stride + dims, mask=mask)
    v = tl.load(v_ptr + token * v_token_stride + heads * v_head_stride + dims, mask=mask)
    to_k = k_cache_ptr + block * k_block_stride + offset * k_slot_stride + heads * k_cache_head_stride + dims
    to_v = v_cache_ptr + block * v_block_stride + offset * v_slot_stride + heads * v_cache_head_stride + dims
    store_cached(to_k, k, mask, FP8)
    store_cached(to_v, v, mask, FP8)
