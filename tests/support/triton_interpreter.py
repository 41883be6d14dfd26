"""Triton's interpreter for tests, with bfloat16 as devices have it.

It keeps bfloat16 as the bits of integers, multiplies those in `tl.dot`, and cuts float32 off where devices round.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def mend_bfloat16() -> None:
    """Make products and conversions of bfloat16 right in the interpreter of this process."""
    plain_dot, plain_cast = Builder.create_dot, Builder.cast_impl

    def create_dot(self, a, b, *others):
        return plain_dot(self, _widened(a), _widened(b), *others)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return Handle(_rounded(src.data), dst_type.scalar)
        return plain_cast(self, src, dst_type)

    Builder.create_dot = create_dot
    Builder.cast_impl = cast_impl


def _widened(handle: Handle) -> Handle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(data: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), nearest.reshape(data.shape))
