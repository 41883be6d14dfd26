"""BatchFrame: the tensors of a batch of one shape, and the host memory that they are filled from."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch


class FrameShape(NamedTuple):
    """What the sizes of a batch's tensors follow from."""

    num_tokens: int
    num_position_rows: int
    num_logits: int
    num_seqs: int
    max_blocks: int


class BatchFrame:
    """One buffer for each integer width. On a CPU the tensors are views of it, elsewhere of one copy of it.

    See `ForwardBatch` and `RaggedBatch` for what the tensors mean.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    slot_mapping: torch.Tensor
    logits_indices: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor

    def __init__(self, shape: FrameShape, device: torch.device) -> None:
        self.shape = shape
        self._device = device
        self._is_host = device.type == "cpu"
        num_wide = shape.num_tokens * (2 + shape.num_position_rows) + shape.num_logits
        num_narrow = 2 * shape.num_seqs + 1 + shape.num_seqs * shape.max_blocks
        self._wide, self._narrow = array("q", bytes(8 * num_wide)), array("i", bytes(4 * num_narrow))
        if self._is_host:
            self._cut()

    def fill(
        self, wide: Sequence[int], query_lens: Sequence[int], seq_lens: Sequence[int], tables: Sequence[array[int]]
    ) -> None:
        """Take what is new.

        `wide` is token ids, positions, perhaps rope lengths, slots and indices of logits, one behind the other;
        `tables` are the blocks of each sequence, at most `max_blocks`; they are filled up with zeros in place.
        """
        num_seqs, max_blocks = self.shape.num_seqs, self.shape.max_blocks
        self._wide[:] = array("q", wide)
        self._narrow[: 2 * num_seqs + 1] = array("i", [0, *accumulate(query_lens), *seq_lens])
        start = 2 * num_seqs + 1
        for table in tables:
            table.extend([0] * (max_blocks - len(table)))
            self._narrow[start : start + max_blocks] = table
            start += max_blocks
        if not self._is_host:
            self._cut()

    def _cut(self) -> None:
        """Cut the buffers into the tensors of the batch; elsewhere than on a CPU, a copy of what they hold."""
        num_tokens, num_rows, num_logits, num_seqs, max_blocks = self.shape
        sizes = [num_tokens, num_tokens * num_rows, num_tokens, num_logits]
        ids, positions, self.slot_mapping, self.logits_indices = self._tensor(self._wide, torch.int64).split(sizes)
        self.input_ids, self.position_ids = ids.view(1, num_tokens), positions.view(num_rows, num_tokens)
        narrow = self._tensor(self._narrow, torch.int32)
        self.cu_seqlens_q, self.seq_lens, tables = narrow.split([num_seqs + 1, num_seqs, num_seqs * max_blocks])
        self.block_tables = tables.view(num_seqs, max_blocks)

    def _tensor(self, values: array[int], dtype: torch.dtype) -> torch.Tensor:
        host = torch.frombuffer(values, dtype=dtype)
        return host if self._is_host else host.pin_memory().to(self._device, non_blocking=True)
