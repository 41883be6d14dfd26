"""Device code shared by prefill and decode: one tile of keys and values, folded into a running softmax."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
# Arguments of device code have no types, and Triton 3.1's interpreter reads annotations as they are: no postponing.

import triton
import triton.language as tl

from inference_shardformer.kernels.triton.fp8_kernel import from_e4m3


@triton.jit
def tanh(x):
    """By the exponential, which every version and target has; exact at both ends, and never overflows."""
    small = tl.exp2(tl.abs(x) * -2.8853900817779268)
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def load_cached(pointers, mask, MASKED: tl.constexpr, FP8: tl.constexpr, DTYPE: tl.constexpr):
    """Elements of the cache in the type of the queries. FP8 is 0 (plain), 1 (bytes) or 2 (the device's own type)."""
    if MASKED:  # noqa: SIM108, no conditional expression over tensors of two origins
        loaded = tl.load(pointers, mask=mask, other=0)
    else:
        loaded = tl.load(pointers)
    if FP8 == 1:
        result = from_e4m3(loaded, DTYPE)
    elif FP8 == 2:
        result = loaded.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    else:
        result = loaded
    return result


@triton.jit
def attend_tile(
    q,  # [BLOCK_M, HEAD_PAD]
    acc,  # [BLOCK_M, HEAD_PAD], float32
    peak,  # [BLOCK_M], the largest score so far, in powers of two
    total,  # [BLOCK_M], the sum of exp2(score - peak)
    row_positions,  # [BLOCK_M], where each query stands
    start,  # position of the tile's first key
    seq_len,
    k_ptr,  # at this head
    v_ptr,
    table_ptr,  # at this sequence
    scale,
    softcap,
    k_block_stride,
    k_slot_stride,
    v_block_stride,
    v_slot_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    HAS_SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
    MASKED: tl.constexpr,  # False: every query sees every key of the tile
):
    """The new `(acc, peak, total)`. Masked loads keep what lies beyond a sequence out of the sums."""
    positions = start + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_PAD)
    is_held = positions < seq_len
    is_dim = dims < HEAD_DIM
    NEEDS_MASK: tl.constexpr = MASKED or (HEAD_DIM != HEAD_PAD)
    if MASKED:
        blocks = tl.load(table_ptr + positions // BLOCK_SIZE, mask=is_held, other=0).to(tl.int64)
    else:
        blocks = tl.load(table_ptr + positions // BLOCK_SIZE).to(tl.int64)
    k_rows = blocks * k_block_stride + (positions % BLOCK_SIZE) * k_slot_stride
    k_mask = is_held[None, :] & is_dim[:, None]
    k = load_cached(k_ptr + k_rows[None, :] + dims[:, None], k_mask, NEEDS_MASK, FP8, q.dtype)
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if HAS_SOFTCAP:
        scores = softcap * tanh(scores / softcap)
    scores = scores * 1.4426950408889634
    if MASKED:
        is_visible = is_held[None, :] & (positions[None, :] <= row_positions[:, None])
        if WINDOW > 0:
            is_visible = is_visible & (positions[None, :] > row_positions[:, None] - WINDOW)
        scores = tl.where(is_visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = new_peak
    if MASKED:
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing seen yet: weights of 0, not NaN
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    v_rows = blocks * v_block_stride + (positions % BLOCK_SIZE) * v_slot_stride
    v_mask = is_held[:, None] & is_dim[None, :]
    v = load_cached(v_ptr + v_rows[:, None] + dims[None, :], v_mask, NEEDS_MASK, FP8, q.dtype)
    acc = tl.dot(weights.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_peak, total * shrink + tl.sum(weights, 1)
