"""Tensors of e4m3 as torch handles them: rounded without overflow, and moved by index as the bytes that they are."""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn
LARGEST_E4M3 = 448.0
SMALLEST_ROW = 2.0**-100  # the largest element that a row is taken to have at least: no scale is zero


def to_stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values in the type of a cache; what lies beyond e4m3 becomes its largest number, where torch may make a NaN."""
    if dtype is E4M3 and values.dtype is not E4M3:
        return values.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(E4M3)
    return values.to(dtype)


def as_indexed(x: torch.Tensor) -> torch.Tensor:
    """A view that every version of torch indexes on every device: e4m3 as bytes, all else as it is."""
    return x.view(torch.uint8) if x.dtype is E4M3 else x


def store_rows(target: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """Put values at places along the first axis of a tensor, in its type."""
    as_indexed(target).index_copy_(0, index, as_indexed(to_stored(values, target.dtype)))


def gather_rows(source: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of places along the first axis of a tensor, in another type where they have another one."""
    return as_indexed(source).index_select(0, index).view(source.dtype).to(dtype)
