"""Device code: one row of numbers to e4m3 with a scale of its own."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
# Arguments of device code have no types, and Triton 3.1's interpreter reads annotations as they are: no postponing.

import triton
import triton.language as tl

from inference_shardformer.kernels.triton.fp8_kernel import to_e4m3


@triton.jit
def fp8_rows_kernel(
    codes_ptr,  # bytes [num_rows, width]
    scales_ptr,  # [num_rows]
    x_ptr,
    x_stride,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One program: one row, in registers from the load to the store; zeros behind its `SIZE` elements."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH_PAD)
    x = tl.load(x_ptr + row * x_stride + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 0), SMALLEST), LARGEST)
    tl.store(codes_ptr + row * WIDTH + columns, to_e4m3(tl.div_rn(x, scale)), mask=columns < WIDTH)
    tl.store(scales_ptr + row, scale)
