"""Device code: rotary embedding of packed queries and keys, with the write of keys and values to their slots."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
# Arguments of device code have no types, and Triton 3.1's interpreter reads annotations as they are: no postponing.

import triton
import triton.language as tl

from inference_shardformer.kernels.triton.write_kernel import store_cached


@triton.jit
def store_heads(
    out_ptr,  # at this token
    k_cache_ptr,  # at this slot
    v_cache_ptr,
    value,
    heads,
    dims,
    mask,
    is_stored,
    k_cache_head_stride,
    v_cache_head_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FP8: tl.constexpr,
):
    """Query heads to the output, key and value heads to the caches."""
    FIRST_V: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    is_q = heads < NUM_HEADS
    is_v = heads >= FIRST_V
    to_out = out_ptr + heads * HEAD_DIM + dims
    tl.store(to_out, value.to(out_ptr.dtype.element_ty), mask=mask & is_q)
    to_k = k_cache_ptr + (heads - NUM_HEADS) * k_cache_head_stride + dims
    store_cached(to_k, value, mask & is_stored & (heads >= NUM_HEADS) & (heads < FIRST_V), FP8)
    to_v = v_cache_ptr + (heads - FIRST_V) * v_cache_head_stride + dims
    store_cached(to_v, value, mask & is_stored & is_v, FP8)


@triton.jit
def rotary_kernel(
    out_ptr,  # [num_tokens, num_heads, head_dim]
    qkv_ptr,  # [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
    k_cache_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache_ptr,
    slots_ptr,  # [num_tokens]
    cos_ptr,  # [num_rows, half of rotary_dim]
    sin_ptr,
    rows_ptr,  # [num_tokens], which row of angles a token takes
    qkv_token_stride,
    cos_stride,
    sin_stride,
    k_block_stride,
    k_slot_stride,
    k_cache_head_stride,
    v_block_stride,
    v_slot_stride,
    v_cache_head_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # of the elements that turn
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,  # 0: all elements turn
    BLOCK_SIZE: tl.constexpr,
    HAS_ROWS: tl.constexpr,  # False: token i takes row i
    FP8: tl.constexpr,
):
    """One program: `HEAD_TILE` heads of one token. Element `i` pairs with `i + HALF`."""
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE))[:, None]
    is_head = heads < NUM_HEADS + 2 * NUM_KV_HEADS
    turns = heads < NUM_HEADS + NUM_KV_HEADS
    slot = tl.load(slots_ptr + token).to(tl.int64)
    is_stored = slot + heads * 0 >= 0  # one for each head: the interpreter gets masks of one element wrong
    slot = tl.maximum(slot, 0)
    out_ptr += token * (NUM_HEADS * HEAD_DIM)
    qkv_ptr += token * qkv_token_stride
    k_cache_ptr += (slot // BLOCK_SIZE) * k_block_stride + (slot % BLOCK_SIZE) * k_slot_stride
    v_cache_ptr += (slot // BLOCK_SIZE) * v_block_stride + (slot % BLOCK_SIZE) * v_slot_stride
    row = token
    if HAS_ROWS:
        row = tl.load(rows_ptr + token).to(tl.int64)

    dims = tl.arange(0, HALF_PAD)[None, :]
    mask = is_head & (dims < HALF)
    first = tl.load(qkv_ptr + heads * HEAD_DIM + dims, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + heads * HEAD_DIM + HALF + dims, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + row * cos_stride + dims, mask=dims < HALF, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * sin_stride + dims, mask=dims < HALF, other=0.0).to(tl.float32)
    turned_first = tl.where(turns, first * cos - second * sin, first)
    turned_second = tl.where(turns, second * cos + first * sin, second)
    store_heads(
        out_ptr, k_cache_ptr, v_cache_ptr, turned_first, heads, dims, mask, is_stored,
        k_cache_head_stride, v_cache_head_stride, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, FP8,
    )  # fmt: skip
    store_heads(
        out_ptr, k_cache_ptr, v_cache_ptr, turned_second, heads, dims + HALF, mask, is_stored,
        k_cache_head_stride, v_cache_head_stride, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, FP8,
    )  # fmt: skip
    if REST_PAD > 0:
        rest = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
        rest_mask = is_head & (rest < HEAD_DIM)
        kept = tl.load(qkv_ptr + heads * HEAD_DIM + rest, mask=rest_mask, other=0.0)
        store_heads(
            out_ptr, k_cache_ptr, v_cache_ptr, kept, heads, rest, rest_mask, is_stored,
            k_cache_head_stride, v_cache_head_stride, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, FP8,
        )  # fmt: skip
