"""Device code: attention of one query token per sequence, cut along the context, and the kernel that joins the cuts."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
# Arguments of device code have no types, and Triton 3.1's interpreter reads annotations as they are: no postponing.

import triton
import triton.language as tl

from inference_shardformer.kernels.triton.tile_kernel import attend_tile


@triton.jit
def cut(seq_len, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_TOKENS: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """First visible tile, tokens of a split, number of splits: functions of the sequence alone, whoever is beside it.

    `shapes.num_splits` is the same on the host.
    """
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(seq_len - WINDOW, 0) // BLOCK_N * BLOCK_N
    length = seq_len - begin
    fair = (length + MAX_SPLITS * BLOCK_N - 1) // (MAX_SPLITS * BLOCK_N) * BLOCK_N
    split_len = tl.maximum(fair, SPLIT_TOKENS)
    return begin, split_len, (length + split_len - 1) // split_len


@triton.jit(do_not_specialize=["table_stride", "split_stride"])
def decode_kernel(
    partial_ptr,  # float32 [num_decodes, num_heads, max_splits, HEAD_PAD]
    lse_ptr,  # float32 [num_decodes, num_heads, max_splits], logarithm to base 2 of each split's sum
    q_ptr,  # [num_decodes, num_heads, head_dim]
    k_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_ptr,
    tables_ptr,  # [num_decodes, max_blocks]
    lens_ptr,  # [num_decodes]
    scale,
    softcap,
    num_heads,
    split_stride,  # max_splits
    q_token_stride,
    q_head_stride,
    k_block_stride,
    k_slot_stride,
    k_head_stride,
    v_block_stride,
    v_slot_stride,
    v_head_stride,
    table_stride,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
):
    """One program: the query heads of one key head, and every `num_programs(2)`-th split of one sequence."""
    NUM_GROUP_TILES: tl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    seq = tl.program_id(0)
    kv_head = tl.program_id(1) // NUM_GROUP_TILES
    seq_len = tl.load(lens_ptr + seq)
    begin, split_len, num_splits = cut(seq_len, WINDOW, BLOCK_N, SPLIT_TOKENS, MAX_SPLITS)
    if tl.program_id(2) >= num_splits:
        return
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_PAD)
    in_group = (tl.program_id(1) % NUM_GROUP_TILES) * GROUP_TILE + rows
    is_row = (rows < GROUP_TILE) & (in_group < GROUP)
    heads = kv_head * GROUP + in_group
    q_rows = seq.to(tl.int64) * q_token_stride + heads * q_head_stride
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=mask, other=0.0)
    row_positions = tl.zeros([BLOCK_M], dtype=tl.int32) + (seq_len - 1)
    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
    stats = (seq.to(tl.int64) * num_heads + heads) * split_stride
    for split in range(tl.program_id(2), num_splits, tl.num_programs(2)):
        acc = tl.zeros([BLOCK_M, HEAD_PAD], dtype=tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        start = begin + split * split_len
        end = tl.minimum(start + split_len, seq_len)
        for at in range(start, end, BLOCK_N):
            acc, peak, total = attend_tile(
                q, acc, peak, total, row_positions, at, seq_len, k_ptr, v_ptr, table_ptr, scale, softcap,
                k_block_stride, k_slot_stride, v_block_stride, v_slot_stride,
                HEAD_DIM, HEAD_PAD, BLOCK_SIZE, BLOCK_N, WINDOW, HAS_SOFTCAP, FP8, True,
            )  # fmt: skip
        out_rows = (stats + split) * HEAD_PAD
        tl.store(partial_ptr + out_rows[:, None] + dims[None, :], acc / total[:, None], mask=is_row[:, None])
        tl.store(lse_ptr + stats + split, peak + tl.log2(total), mask=is_row)


@triton.jit(do_not_specialize=["split_stride"])
def combine_kernel(
    out_ptr,  # [num_decodes, num_heads, head_dim]
    partial_ptr,  # float32 [num_decodes, num_heads, max_splits, HEAD_PAD]
    lse_ptr,  # float32 [num_decodes, num_heads, max_splits]
    sinks_ptr,  # [num_heads]
    lens_ptr,  # [num_decodes]
    split_stride,  # max_splits
    out_token_stride,
    out_head_stride,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One program: one head of one sequence, its splits weighted by their sums. Zeros where a sequence is empty."""
    seq = tl.program_id(0)
    head = tl.program_id(1)
    _, _, num_splits = cut(tl.load(lens_ptr + seq), WINDOW, BLOCK_N, SPLIT_TOKENS, MAX_SPLITS)
    splits = tl.arange(0, MAX_SPLITS)
    dims = tl.arange(0, HEAD_PAD)
    stats = (seq.to(tl.int64) * tl.num_programs(1) + head) * split_stride
    is_split = splits < num_splits
    lse = tl.load(lse_ptr + stats + splits, mask=is_split, other=float("-inf"))
    peak = tl.max(lse, 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(lse - peak)
    total = tl.sum(weights, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - peak)
    rows = (stats + splits) * HEAD_PAD
    partial = tl.load(partial_ptr + rows[:, None] + dims[None, :], mask=is_split[:, None], other=0.0)
    result = tl.sum(partial * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    out = out_ptr + seq.to(tl.int64) * out_token_stride + head * out_head_stride + dims
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
