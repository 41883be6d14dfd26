"""Sums over ranks in the order in which real collectives add, so that results agree to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

ReductionOrder = Literal["gloo", "shm"]
_GLOO_SEGMENT_BYTES = 2**20  # gloo's default for the largest segment of its ring


def reduce_sum(parts: Sequence[torch.Tensor], order: ReductionOrder) -> torch.Tensor:
    """The sum of every rank's tensor, as a new tensor.

    "gloo": as gloo's ring all-reduce, every sum rounded to the type. "shm": as our sums through shared memory, from
    rank 0 up in float32, rounded once.
    """
    if order == "shm":
        wide = torch.promote_types(parts[0].dtype, torch.float32)
        return _in_turn([part.to(wide) for part in parts]).to(parts[0].dtype)
    if len(parts) <= 2:  # a sum of two does not depend on their order
        return _in_turn(parts)
    flat = [part.contiguous().view(-1) for part in parts]
    total = torch.empty_like(flat[0])
    size, block = len(parts), _gloo_block(flat[0], len(parts))
    for start in range(0, total.numel(), block):
        last = start // block
        ring = [flat[(last - step) % size][start : start + block] for step in range(1, size + 1)]
        total[start : start + block] = _in_turn(ring)
    return total.view(parts[0].shape)


def _in_turn(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _gloo_block(flat: torch.Tensor, size: int) -> int:
    """Elements of the block that one rank completes.

    Ring reduce-scatter of facebookincubator/gloo, allreduce.cc: at least two segments a rank, each of at most 1 MiB;
    block `b` starts at rank `b - 1`, travels downwards round the ring, and is complete at rank `b`.
    """
    width, num_bytes = flat.element_size(), flat.numel() * flat.element_size()
    largest = width * max(1, _GLOO_SEGMENT_BYTES // width)
    num_segments = max(_ceil(num_bytes, largest), 2 * size)
    per_rank = _ceil(num_segments, size)
    segment = _ceil(_ceil(num_bytes, per_rank * size), width)  # in elements
    return max(1, per_rank * segment)


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
