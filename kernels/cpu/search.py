"""The greatest elements of each row, by native kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from inference_shardformer.kernels.cpu.arguments import ArgmaxArgs, TopKArgs
from inference_shardformer.kernels.cpu.library import NativeKernel
from inference_shardformer.kernels.cpu.rows import dtype_of, rows_of

_argmax = NativeKernel("argmax", ArgmaxArgs)
_topk = NativeKernel("topk", TopKArgs)


class Found(NamedTuple):
    """Values and where they stand in their rows. A shard adds its own first column to the indices."""

    values: torch.Tensor  # float32
    indices: torch.Tensor  # int64


def argmax(x: torch.Tensor, *, out: Found | None = None) -> Found:
    """The greatest element of each row of `[..., size]`, the first among equals; shapes `[...]`.

    NaN is above everything: a row that has one shows in its value. What is given as `out` is written and returned.
    """
    code, rows = dtype_of("x", x), rows_of("x", x)
    if not rows.size:
        raise ValueError("x has no columns; there is no greatest element of nothing")
    shape = x.shape[:-1]
    found = Found(torch.empty(shape), torch.empty(shape, dtype=torch.int64)) if out is None else out
    if found.values.shape != shape or found.indices.shape != shape:
        raise ValueError(f"out is of shape {tuple(found.indices.shape)}; the rows of x are {tuple(shape)}")
    _argmax(
        *(x.data_ptr(), found.indices.data_ptr(), found.values.data_ptr(), None),
        *(*rows, code, 0),
    )
    return found


def topk(x: torch.Tensor, k: int) -> Found:
    """The `k` greatest elements of each row of `[..., size]`, best first; shapes `[..., k]`.

    Among equals the lower index comes first. NaN is above everything.
    """
    code, rows = dtype_of("x", x), rows_of("x", x)
    if not 0 < k <= rows.size:
        raise ValueError(f"k={k} is not between 1 and the {rows.size} columns of x")
    shape = (*x.shape[:-1], k)
    found = Found(torch.empty(shape), torch.empty(shape, dtype=torch.int64))
    _topk(x.data_ptr(), found.indices.data_ptr(), found.values.data_ptr(), *rows, k, code, 0)
    return found
