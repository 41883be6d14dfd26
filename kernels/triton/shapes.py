"""What attention kernels are specialised on, and the tiles that follow from it. Imports no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

MAX_HEAD_DIM = 256
MAX_SPLITS = 64  # of one sequence's context, in decode
SPLIT_TOKENS = 256  # the least that is worth a program of its own


@dataclass(frozen=True)
class AttentionShape:
    """What does not change between the steps of a model on one rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def head_pad(self) -> int:
        """The head dimension in registers: a power of two, at least what a matrix unit takes."""
        return max(16, power_of_two(self.head_dim))


class DecodeWorkspace(NamedTuple):
    """Where the splits of a decode are kept until they are joined; one serves every layer of a step."""

    partial: torch.Tensor  # float32 [num_decodes, num_heads, max_splits, head_pad]
    lse: torch.Tensor  # float32 [num_decodes, num_heads, max_splits]
    num_programs: int  # that share the splits of a sequence


class PagedBatch(Protocol):
    """What kernels read of a packed batch. Sequences with one query token come first."""

    @property
    def cu_seqlens_q(self) -> torch.Tensor:
        """Where each sequence's queries start, int32 `[num_seqs + 1]`."""

    @property
    def seq_lens(self) -> torch.Tensor:
        """Tokens visible to the last query, int32 `[num_seqs]`."""

    @property
    def block_tables(self) -> torch.Tensor:
        """The blocks of each sequence, int32 `[num_seqs, max_blocks]`."""

    @property
    def num_decodes(self) -> int:
        """How many leading sequences have exactly one query token."""


class Tiles(NamedTuple):
    """Sizes of one program: rows of queries, query heads among them, keys at a time, warps, loads in flight."""

    block_m: int
    group_tile: int
    block_n: int
    num_warps: int
    num_stages: int


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def prefill_tiles(shape: AttentionShape, *, has_wgmma: bool) -> Tiles:
    """Tiles of the prefill kernel: what compiles without a spilled register, without `has_wgmma` in 99 KiB.

    `has_wgmma`: the matrix units read from shared memory, of which there is more; that leaves registers for more rows.
    Three stages: the block of a key is loaded before the key, and Triton 3.1 overlaps neither with less.
    """
    row_bytes = shape.head_pad * shape.dtype.itemsize
    if row_bytes <= 128 or (row_bytes <= 256 and has_wgmma):
        block_m, block_n, num_warps = 128, 64, 8
    elif row_bytes <= 256:
        block_m, block_n, num_warps = 64, 32, 4
    elif row_bytes <= 512:
        block_m, block_n, num_warps = 128 if has_wgmma else 64, 32, 8  # 3.1 takes 64 rows there for four warps only
    else:
        block_m, block_n, num_warps = 32, 16, 4
    return Tiles(block_m, min(shape.group, block_m), block_n, num_warps, 3)


def decode_tiles(shape: AttentionShape) -> Tiles:
    """Tiles of the decode kernel: as few rows as a matrix unit takes, and several loads in flight."""
    row_bytes = shape.head_pad * shape.dtype.itemsize
    block_m = min(max(16, power_of_two(shape.group)), 64 if row_bytes <= 256 else 16)
    block_n = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    return Tiles(block_m, min(shape.group, block_m), block_n, 4, 3 if row_bytes <= 512 else 2)


def num_splits(seq_len: int, window: int | None, block_n: int) -> int:
    """Into how many pieces `decode_kernel.cut` cuts the visible part of a sequence."""
    begin = 0 if window is None else max(seq_len - window, 0) // block_n * block_n
    length = seq_len - begin
    fair = -(-length // (MAX_SPLITS * block_n)) * block_n
    return -(-length // max(fair, SPLIT_TOKENS))
