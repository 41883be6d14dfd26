"""Device code: e4m3 numbers as bytes, read and written with integer arithmetic, on devices without such a type."""

# ruff: noqa: ANN001, ANN201
# mypy: ignore-errors
# Arguments of device code have no types, and Triton 3.1's interpreter reads annotations as they are: no postponing.

import triton
import triton.language as tl


@triton.jit
def from_e4m3(code, DTYPE: tl.constexpr):
    """Bytes of e4m3 to `DTYPE`, exactly.

    Shifted into the fields of a float32 they stand for 2^-120 of their value, subnormal ones too.
    """
    wide = code.to(tl.int32)
    bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value).to(DTYPE)


@triton.jit
def to_e4m3(value):
    """Numbers to bytes of e4m3, to the nearest, ties to even; beyond the range the largest, 448."""
    wide = value.to(tl.float32)
    bits = wide.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    # Normal: keep three bits of the mantissa, then move the exponent's bias from 127 to 7.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6: 2^14 has a unit in the last place of 2^-9, the step of subnormal numbers, so the sum rounds to it.
    magnitude = size.to(tl.float32, bitcast=True)
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, subnormal, normal)
    code = tl.where(size > 0x7F800000, 0x7F, tl.minimum(code, 0x7E))
    return (code | sign).to(tl.uint8)
