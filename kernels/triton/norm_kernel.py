"""Device code: root-mean-square normalisation of one row, with the sum that goes before it."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
# Arguments of device code have no types, and Triton 3.1's interpreter reads annotations as they are: no postponing.

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    out_ptr,  # [num_rows, size]
    x_ptr,
    weight_ptr,  # [size]
    residual_ptr,  # [num_rows, size]
    sum_ptr,  # [num_rows, size], where the sum goes; may be the residual's place
    eps,
    x_stride,
    residual_stride,
    sum_stride,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    ROUNDS_BEFORE_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """One program: one row, in registers from the load to the store."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SIZE_PAD)
    mask = columns < SIZE
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        before = tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0)
        x = (before.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row * sum_stride + columns, x, mask=mask)
    wide = x.to(tl.float32)
    normed = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / SIZE + eps))
    if ROUNDS_BEFORE_WEIGHT:
        normed = normed.to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) + WEIGHT_OFFSET
    tl.store(out_ptr + row * SIZE + columns, (normed * weight).to(x.dtype), mask=mask)
