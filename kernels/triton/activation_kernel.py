"""Device code: the activation of a gate, times what it gates."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
# Arguments of device code have no types, and Triton 3.1's interpreter reads annotations as they are: no postponing.

import triton
import triton.language as tl


@triton.jit
def gated_kernel(
    out_ptr,  # [num_rows, size]
    gate_up_ptr,  # [num_rows, 2 * size], gate first
    row_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_GELU: tl.constexpr,  # gelu's tanh form, else silu
):
    """One program: `BLOCK` columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    gate_up_ptr += row * row_stride
    gate = tl.load(gate_up_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    if IS_GELU:  # noqa: SIM108, tensors of two origins
        # Half of 1 + tanh(x) is the logistic function of 2 x.
        exponent = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    else:
        exponent = gate
    active = gate / (1.0 + tl.exp2(tl.minimum(exponent * -1.4426950408889634, 126.0)))
    tl.store(out_ptr + row * SIZE + columns, (active * up).to(out_ptr.dtype.element_ty), mask=mask)
