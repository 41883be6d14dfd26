"""A packed bf16 weight in 12 bits an element instead of 16, without loss: `src/compact.h` says how.

Products over it are those over the plain packed weight, bit for bit, and memory has a quarter less to bring. The idea
that exponents of trained weights need few bits: T. Zhang et al., "70% Size, 100% Accuracy" (DFloat11), 2025, and
M. Hershcovitch et al., "ZipNN", 2024; their codes have variable length, ours four bits and a list of exceptions.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch

from inference_shardformer.kernels.cpu.library import NativeKernel, native
from inference_shardformer.kernels.cpu.linear_arguments import COMPACT_BFLOAT16, WEIGHT_DTYPES, CompactArgs
from inference_shardformer.kernels.cpu.packed_weight import PackedWeight, WeightArena, check_sizes, packed_sizes

_compress = NativeKernel("linear_compress", CompactArgs)
_expand = NativeKernel("linear_expand", CompactArgs)

_LARGEST_DEPTH = 1 << 18  # places of exceptions have 24 bits, and stay below that of the list's end
_PANEL_ROWS = 32
_BLOCK_BYTES = 1 << 20  # of rows that are compressed together
_GAINING = frozenset({"avx512", "avx512_bf16", "amx"})  # levels whose instructions expand faster than memory reads


class _Contents:
    """What changes: a draft, plain packed, while it is written, and then the lists that are too long for panels."""

    def __init__(self) -> None:
        self.draft: PackedWeight | None = None
        self.has_values = False  # that are compressed
        # int32; by first row and number of the rows that were compressed together
        self.exceptions: dict[tuple[int, int], torch.Tensor] = {}


@dataclass(frozen=True, eq=False)
class CompactWeight(PackedWeight):
    """The weight `[out_features, in_features]` of a linear layer, packed, and compressed by `settle`.

    Until then kernels may see what was settled before, zeros at first. `is_filled` says that every element will be
    written before the first `settle`.
    """

    arena: WeightArena
    is_filled: bool = False
    contents: _Contents = field(default_factory=_Contents)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dtype_code", COMPACT_BFLOAT16)

    @property
    def num_bytes(self) -> int:
        """Memory of codes and exceptions."""
        return self.storage.numel() + sum(each.numel() * 4 for each in self.contents.exceptions.values())

    def write(self, slab: torch.Tensor, *, row: int = 0, column: int = 0) -> None:
        """Put rows `row` and columns `column` onwards from a plain slab into a draft, which `settle` compresses.

        Whole panels are compressed at once, by a megabyte: a large weight then never is here in both forms.
        Raises `ValueError` for a slab that does not fit or has another type, and `MemoryError`.
        """
        if self.contents.draft is None and self._is_of_panels(slab, row, column):
            step = max(_PANEL_ROWS, _BLOCK_BYTES // (2 * self.in_features) // _PANEL_ROWS * _PANEL_ROWS)
            for first in range(0, len(slab), step):
                block = self._draft(len(slab[first : first + step]))
                block.write(slab[first : first + step])
                self._compress(block, row + first)
            return
        if self.contents.draft is None:
            is_whole = tuple(slab.shape) == (self.out_features, self.in_features)
            self.contents.draft = self._draft() if is_whole else self._expanded()
        self.contents.draft.write(slab, row=row, column=column)

    def settle(self) -> None:
        """Compress what was written, into the memory that the weight always has. Raises `MemoryError`."""
        draft, self.contents.draft = self.contents.draft, None
        if draft is not None:
            self.contents.exceptions.clear()
            self._compress(draft)

    def read(self, *, row: int = 0, num_rows: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows of the plain weight `[num_rows, in_features]`, bit for bit.

        Raises `ValueError` for rows that are not there, and for a `dtype` other than the weight's.
        """
        if self.contents.draft is not None:
            return self.contents.draft.read(row=row, num_rows=num_rows, dtype=dtype)
        expanded = self._expanded()
        try:
            return expanded.read(row=row, num_rows=num_rows, dtype=dtype)
        finally:
            self.arena.take_back(expanded.storage)

    def _is_of_panels(self, slab: torch.Tensor, row: int, column: int) -> bool:
        end = row + len(slab)
        is_aligned = row % _PANEL_ROWS == 0 and (end % _PANEL_ROWS == 0 or end == self.out_features)
        is_wide = slab.dim() == 2 and slab.shape[1] == self.in_features and column == 0
        return self.segments == 1 and is_wide and is_aligned and 0 <= row < end <= self.out_features

    def _compress(self, draft: PackedWeight, row: int = 0) -> None:
        """Compress a draft of the rows from `row` on, and give it back."""
        panel, exceptions = row // _PANEL_ROWS, torch.empty(0, dtype=torch.int32)
        needed = self._compress_with(draft, panel, exceptions)
        if needed > 0:
            exceptions = torch.empty(needed, dtype=torch.int32)
            self._compress_with(draft, panel, exceptions)
        self.contents.exceptions[row, draft.out_features] = exceptions
        self.contents.has_values = True
        self.arena.take_back(draft.storage)

    def _compress_with(self, draft: PackedWeight, panel: int, exceptions: torch.Tensor) -> int:
        """Compress to the panels from `panel` on; says how much room for exceptions was needed."""
        two, one = (packed_sizes(COMPACT_BFLOAT16, count, self.in_features, 1)[0] for count in (2 * _PANEL_ROWS, 1))
        needed = ctypes.c_int64(0)
        _compress(
            *(draft.storage_pointer, self.storage_pointer + panel * (two - one), exceptions.data_ptr()),
            *(ctypes.addressof(needed), draft.out_features, self.in_features, exceptions.numel(), self.segments, 0),
        )
        if needed.value > 2 * draft.storage.numel():
            raise MemoryError(f"there is no memory to compress a panel of {self.in_features} columns")
        return needed.value

    def _expanded(self) -> PackedWeight:
        """A draft of the same values."""
        draft = self._draft()
        if self.contents.has_values:
            _expand(
                *(draft.storage_pointer, self.storage_pointer, None, None),
                *(self.out_features, self.in_features, 0, self.segments, 0),
            )
        return draft

    def _draft(self, num_rows: int | None = None) -> PackedWeight:
        """A plain packed weight in borrowed memory: zeros, or anything where all of it will be written."""
        rows = num_rows or self.out_features
        num_bytes, num_panels = packed_sizes(WEIGHT_DTYPES[self.dtype], rows, self.in_features, self.segments)
        storage = self.arena.lend(num_bytes)
        has_padding = self.in_features % _PANEL_ROWS != 0 or num_panels * _PANEL_ROWS != rows
        is_written = num_rows is not None or self.is_filled or self.contents.has_values
        if has_padding or not is_written:
            storage[:num_bytes].zero_()
        return PackedWeight(rows, self.in_features, self.dtype, self.segments, 0, storage, None)


def can_compress(dtype: torch.dtype, in_features: int = 1) -> bool:
    """Whether weights of a type can be compact, and whether this machine's kernels gain by it."""
    return dtype == torch.bfloat16 and in_features <= _LARGEST_DEPTH and native().isa_level in _GAINING


def num_compact_bytes(out_features: int, in_features: int, *, segments: int = 1) -> int:
    """What `CompactWeight.num_bytes` of such a weight will be, unless lists are too long for their panels."""
    return packed_sizes(COMPACT_BFLOAT16, out_features, in_features, segments)[0]


def empty_compact_weight(
    out_features: int, in_features: int, *, segments: int = 1, is_filled: bool = False, arena: WeightArena | None = None
) -> CompactWeight:
    """A compact bf16 weight of zeros, to be written in slabs and settled.

    Raises `ValueError` for sizes that the kernels cannot serve.
    """
    check_sizes(out_features, in_features, segments)
    if in_features > _LARGEST_DEPTH:
        raise ValueError(f"in_features={in_features} is more than a compact weight can have, {_LARGEST_DEPTH}")
    arena = arena or WeightArena()
    num_bytes, _ = packed_sizes(COMPACT_BFLOAT16, out_features, in_features, segments)
    storage = arena.take(num_bytes)
    return CompactWeight(out_features, in_features, torch.bfloat16, segments, 0, storage, None, arena, is_filled)
