"""Device code: rows sorted by expert, each times the weight of its own; the experts met are found on the device."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
# Arguments of device code have no types, and Triton 3.1's interpreter reads annotations as they are: no postponing.

import triton
import triton.language as tl


@triton.jit
def experts_kernel(
    out_ptr,  # [num_rows, OUT_FEATURES]
    x_ptr,  # [any, IN_FEATURES]
    rows_ptr,  # int64 [num_rows], which row of x each takes
    ends_ptr,  # int32 [NUM_EXPERTS], behind the last row of each expert
    weights_ptr,  # int64 [NUM_EXPERTS], addresses of [OUT_FEATURES, IN_FEATURES] in the type of x
    x_stride,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_PAD: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    ALIGNED: tl.constexpr,  # addresses are multiples of 16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: `BLOCK_M` rows of one expert, `BLOCK_N` features. Those that no expert needs return at once."""
    experts = tl.arange(0, EXPERTS_PAD)
    is_expert = experts < NUM_EXPERTS
    ends = tl.load(ends_ptr + experts, mask=is_expert, other=0)
    starts = tl.load(ends_ptr + experts - 1, mask=is_expert & (experts > 0), other=0)
    tiles = tl.where(is_expert, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)
    tile_ends = tl.cumsum(tiles, 0)
    tile = tl.program_id(1)
    expert = tl.sum(((tile_ends <= tile) & is_expert).to(tl.int32), 0)
    if expert < NUM_EXPERTS:
        is_own = experts == expert
        first_tile = tl.sum(tl.where(is_own, tile_ends - tiles, 0), 0)
        end = tl.sum(tl.where(is_own, ends, 0), 0)
        places = tl.sum(tl.where(is_own, starts, 0), 0) + (tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_row = places < end
        rows = tl.load(rows_ptr + places, mask=is_row, other=0)
        columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_column = columns < OUT_FEATURES
        inner = tl.arange(0, BLOCK_K)
        weight_ptr = tl.load(weights_ptr + expert).to(tl.pointer_type(x_ptr.dtype.element_ty))
        if ALIGNED:
            weight_ptr = tl.multiple_of(weight_ptr, 16)
        x_at = x_ptr + rows[:, None] * x_stride + inner[None, :]
        weight_at = weight_ptr + columns[None, :].to(tl.int64) * IN_FEATURES + inner[:, None]
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for at in range(0, IN_FEATURES, BLOCK_K):
            is_inner = inner < IN_FEATURES - at
            x = tl.load(x_at + at, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            weight = tl.load(weight_at + at, mask=is_column[None, :] & is_inner[:, None], other=0.0)
            total = tl.dot(x, weight, total, input_precision="ieee")
        to_out = out_ptr + places.to(tl.int64)[:, None] * OUT_FEATURES + columns[None, :]
        tl.store(to_out, total.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
