"""Device code: causal attention of packed prompts, and of pieces of prompts, over the paged cache."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
# Arguments of device code have no types, and Triton 3.1's interpreter reads annotations as they are: no postponing.

import triton
import triton.language as tl

from inference_shardformer.kernels.triton.tile_kernel import attend_tile


@triton.jit
def first_tile(starts_ptr, first_seq, seq, BLOCK_Q: tl.constexpr):
    """The first tile of a sequence; one tile is set aside per sequence for what its queries do not fill."""
    return (tl.load(starts_ptr + seq) - tl.load(starts_ptr + first_seq)) // BLOCK_Q + (seq - first_seq)


@triton.jit
def find_sequence(starts_ptr, first_seq, num_seqs, tile, BLOCK_Q: tl.constexpr):
    """The last sequence that starts at this tile or before it, by bisection."""
    low = first_seq
    high = num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        if first_tile(starts_ptr, first_seq, middle, BLOCK_Q) <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit(do_not_specialize=["first_seq", "num_seqs", "table_stride"])
def prefill_kernel(
    out_ptr,  # [num_tokens, num_heads, head_dim]
    q_ptr,  # [num_tokens, num_heads, head_dim]
    k_ptr,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_ptr,
    sinks_ptr,  # [num_heads]
    tables_ptr,  # [num_seqs, max_blocks]
    starts_ptr,  # [num_seqs + 1]
    lens_ptr,  # [num_seqs]
    first_seq,  # the sequences before it are decodes
    num_seqs,
    scale,
    softcap,
    out_token_stride,
    out_head_stride,
    q_token_stride,
    q_head_stride,
    k_block_stride,
    k_slot_stride,
    k_head_stride,
    v_block_stride,
    v_slot_stride,
    v_head_stride,
    table_stride,
    GROUP: tl.constexpr,  # query heads of a key head
    GROUP_TILE: tl.constexpr,  # of them in one program
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    FP8: tl.constexpr,
):
    """One program: `BLOCK_M` rows, each one query head of one token, all of one key head and one sequence."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP_TILE
    NUM_GROUP_TILES: tl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles of a sequence see most: they go first
    kv_head = tl.program_id(1) // NUM_GROUP_TILES
    seq = find_sequence(starts_ptr, first_seq, num_seqs, tile, BLOCK_Q)
    first_token = (tile - first_tile(starts_ptr, first_seq, seq, BLOCK_Q)) * BLOCK_Q
    start = tl.load(starts_ptr + seq)
    query_len = tl.load(starts_ptr + seq + 1) - start
    if first_token >= query_len:
        return
    seq_len = tl.load(lens_ptr + seq)
    past = seq_len - query_len

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_PAD)
    tokens = first_token + rows // GROUP_TILE
    in_group = (tl.program_id(1) % NUM_GROUP_TILES) * GROUP_TILE + rows % GROUP_TILE
    heads = kv_head * GROUP + in_group
    is_row = (tokens < query_len) & (rows // GROUP_TILE < BLOCK_Q) & (in_group < GROUP)
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    packed = (start + tokens).to(tl.int64)
    q_rows = packed * q_token_stride + heads * q_head_stride
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=mask, other=0.0)

    acc = tl.zeros([BLOCK_M, HEAD_PAD], dtype=tl.float32)
    if HAS_SINKS:
        peak = tl.load(sinks_ptr + heads, mask=is_row, other=0.0).to(tl.float32) * 1.4426950408889634
        total = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    else:
        peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)

    row_positions = past + tokens
    begin = 0
    visible_to_all = (past + first_token + 1) // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        begin = tl.maximum(past + first_token - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        visible_to_all = begin  # the window's own edge lies in these tiles: mask them all
    end = tl.minimum(past + first_token + BLOCK_Q, seq_len)
    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
    for at in range(begin, visible_to_all, BLOCK_N):
        acc, peak, total = attend_tile(
            q, acc, peak, total, row_positions, at, seq_len, k_ptr, v_ptr, table_ptr, scale, softcap,
            k_block_stride, k_slot_stride, v_block_stride, v_slot_stride,
            HEAD_DIM, HEAD_PAD, BLOCK_SIZE, BLOCK_N, WINDOW, HAS_SOFTCAP, FP8, False,
        )  # fmt: skip
    for at in range(visible_to_all, end, BLOCK_N):
        acc, peak, total = attend_tile(
            q, acc, peak, total, row_positions, at, seq_len, k_ptr, v_ptr, table_ptr, scale, softcap,
            k_block_stride, k_slot_stride, v_block_stride, v_slot_stride,
            HEAD_DIM, HEAD_PAD, BLOCK_SIZE, BLOCK_N, WINDOW, HAS_SOFTCAP, FP8, True,
        )  # fmt: skip
    out_rows = packed * out_token_stride + heads * out_head_stride
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # rows of padding may have seen nothing
    tl.store(out_ptr + out_rows[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)
