"""Pages: the blocks of some sequences as FlashInfer wants them, one list of block ids behind the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from inference_shardformer.attention.base import RaggedBatch


class Pages(NamedTuple):
    """Lengths lie on the host, where the library plans from them; the ids stay on the device."""

    indptr: torch.Tensor  # int32 [num_seqs + 1], start of each sequence's blocks in `indices`
    indices: torch.Tensor  # int32 [num_blocks_in_use]
    last_page_len: torch.Tensor  # int32 [num_seqs], tokens in the last block of each sequence


def pages_of(batch: RaggedBatch, first: int, end: int, block_size: int) -> Pages:
    """The pages of the sequences from `first` to before `end`.

    Which entries of the block tables are in use is computed from the lengths on the host: nothing waits for a device.
    """
    seq_lens = np.asarray(batch.host_seq_lens[first:end], dtype=np.int64)
    num_blocks = -(-seq_lens // block_size)
    indptr = np.zeros(end - first + 1, dtype=np.int32)
    np.cumsum(num_blocks, out=indptr[1:])
    width = batch.block_tables.shape[1]
    # Place in the flattened tables: the start of the sequence's row, and on from there.
    places = np.repeat((first + np.arange(end - first)) * width - indptr[:-1], num_blocks) + np.arange(indptr[-1])
    device = batch.block_tables.device
    on_device = _staged(places, device).to(device, non_blocking=True)
    return Pages(
        indptr=_staged(indptr, device),
        indices=batch.block_tables.flatten().index_select(0, on_device),
        last_page_len=_staged((seq_lens - (num_blocks - 1) * block_size).astype(np.int32), device),
    )


def _staged(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """On the host, pinned where a device will read it: a copy from ordinary memory waits for the stream."""
    host = torch.from_numpy(values)
    return host if device.type == "cpu" else host.pin_memory()
