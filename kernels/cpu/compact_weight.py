"""A packed bf16 weight in 12 bits an element instead of 16, without loss: `src/compact.h` says how.

Products over it are those over the plain packed weight, bit for bit, and memory has a quarter less to bring. The idea
that exponents of trained weights need few bits: T. Zhang et al., "70% Size, 100% Accuracy" (DFloat11), 2025, and
M. Hershcovitch et al., "ZipNN", 2024; their codes have variable length, ours four bits and a list of exceptions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from inference_shardformer.kernels.cpu.library import NativeKernel, native
from inference_shardformer.kernels.cpu.linear_arguments import COMPACT_BFLOAT16, CompactArgs
from inference_shardformer.kernels.cpu.packed_weight import (
    PackedWeight,
    WeightArena,
    check_sizes,
    empty_weight_in,
    packed_sizes,
    panel_bytes,
)
from inference_shardformer.kernels.host_memory import zeroed_bytes

_compress = NativeKernel("linear_compress", CompactArgs)
_expand = NativeKernel("linear_expand", CompactArgs)

LARGEST_DEPTH = 1 << 18  # places of exceptions have 24 bits, and stay below that of the list's end
_PANEL_ROWS = 32
_BLOCK_BYTES = 1 << 20  # of panels that are compressed together
_GAINING = frozenset({"avx512", "avx512_bf16", "amx"})  # levels whose instructions expand faster than memory reads


class _Draft:
    """A block of panels, plain packed, while it is written."""

    def __init__(self, plain: PackedWeight) -> None:
        self.plain = plain
        self.num_missing = plain.out_features * plain.in_features  # elements that nobody wrote yet


class _Contents:
    """What changes: blocks that are written, and then the lists that are too long for their panels; both by block."""

    def __init__(self) -> None:
        self.drafts: dict[int, _Draft] = {}
        self.compressed: set[int] = set()
        self.exceptions: dict[int, torch.Tensor] = {}  # int32


class _Piece(NamedTuple):
    """Rows of the weight that lie together in one block."""

    block: int
    row: int
    end: int
    place: int  # of the first of them in the block


@dataclass(frozen=True, eq=False)
class CompactWeight(PackedWeight):
    """The weight `[out_features, in_features]` of a linear layer, packed, and compressed by `settle`.

    Until then kernels may see what was settled before, zeros at first, or what is new. `is_filled` says that every
    element will be written before the first `settle`.
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
        """Put rows `row` and columns `column` onwards from a plain slab into drafts of the blocks that hold them.

        A block is compressed as soon as all of it is written, else by `settle`: a large weight whose rows come in the
        order of its panels then never is here in both forms. Raises `ValueError` for a slab that does not fit or has
        another type, and `MemoryError`; what was written is not lost then, and `settle` tries once more.
        """
        self._check_slab(slab, row, column)
        for piece in self._pieces(row, row + len(slab)):
            part = slab[piece.row - row : piece.end - row]
            draft = self.contents.drafts.get(piece.block) or self._begin(piece.block, part.numel())
            draft.plain.write(part, row=piece.place, column=column)
            draft.num_missing -= part.numel()
            if draft.num_missing <= 0:
                self._compress(piece.block)

    def settle(self) -> None:
        """Compress what was written, into the memory that the weight always has. Raises `MemoryError`."""
        for block in tuple(self.contents.drafts):
            self._compress(block)

    def read(self, *, row: int = 0, num_rows: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows of the plain weight `[num_rows, in_features]`, bit for bit.

        Raises `ValueError` for rows that are not there, and for a `dtype` other than the weight's.
        """
        if dtype not in (None, self.dtype):
            raise ValueError(f"a weight of {self.dtype} is read as it is, not as {dtype}; convert what is read")
        count = self.out_features - row if num_rows is None else num_rows
        slab = torch.empty(count, self.in_features, dtype=self.dtype)
        self._check_slab(slab, row, 0)
        for piece in self._pieces(row, row + len(slab)):
            draft = self.contents.drafts.get(piece.block)
            plain = self._expanded(piece.block) if draft is None else draft.plain
            slab[piece.row - row : piece.end - row] = plain.read(row=piece.place, num_rows=piece.end - piece.row)
            if draft is None:
                self.arena.take_back(plain.storage)
        return slab

    @property
    def _block_panels(self) -> int:
        return max(1, _BLOCK_BYTES // (2 * _PANEL_ROWS * self.in_features))

    def _pieces(self, row: int, end: int) -> Iterator[_Piece]:
        """Rows `[row, end)` by block, those of one block behind each other."""
        rows, step = self.out_features // self.segments, self._block_panels * _PANEL_ROWS // self.segments
        spans = [(each, max(row - each * rows, 0), min(end - each * rows, rows)) for each in range(self.segments)]
        spans = [(segment, first, last) for segment, first, last in spans if first < last]
        blocks = {block for _, first, last in spans for block in range(first // step, -(-last // step))}
        for block in sorted(blocks):
            start, size = block * step, min(step, rows - block * step)
            for segment, first, last in spans:
                begin, stop = max(first, start), min(last, start + size)
                if begin < stop:
                    ahead = segment * rows
                    yield _Piece(block, ahead + begin, ahead + stop, segment * size + begin - start)

    def _begin(self, block: int, num_elements: int) -> _Draft:
        """A draft of a block, of which so many elements are about to be written."""
        fresh = self._plain(block)
        draft = self.contents.drafts[block] = _Draft(fresh)
        if block in self.contents.compressed and num_elements < draft.num_missing:
            self._expand_to(fresh, block)
        return draft

    def _compress(self, block: int) -> None:
        """Compress a draft, and give it back. It stays where that fails."""
        draft, held = self.contents.drafts[block].plain, self.contents.exceptions
        room = held.get(block, torch.empty(0, dtype=torch.int32))  # what was compressed before always has room
        self.contents.compressed.add(block)
        needed = self._compress_to(block, draft, room)
        if needed > room.numel():
            room = held[block] = zeroed_bytes(4 * needed).view(torch.int32)
            self._compress_to(block, draft, room)
        if needed == 0:
            held.pop(block, None)
        del self.contents.drafts[block]
        self.arena.take_back(draft.storage)

    def _compress_to(self, block: int, draft: PackedWeight, exceptions: torch.Tensor) -> int:
        """Compress a draft to its panels; says how much room for exceptions was needed."""
        needed = ctypes.c_int64(0)
        _compress(
            *(draft.storage_pointer, self._pointer(block), exceptions.data_ptr(), ctypes.addressof(needed)),
            *(draft.out_features, self.in_features, exceptions.numel(), self.segments, 0),
        )
        if needed.value > 2 * draft.storage.numel():
            raise MemoryError(f"there is no memory to compress a panel of {self.in_features} columns")
        return needed.value

    def _expanded(self, block: int) -> PackedWeight:
        """A borrowed copy of a block."""
        plain = self._plain(block)
        if block in self.contents.compressed:
            self._expand_to(plain, block)
        return plain

    def _expand_to(self, plain: PackedWeight, block: int) -> None:
        _expand(
            *(plain.storage_pointer, self._pointer(block), None, None),
            *(plain.out_features, self.in_features, 0, self.segments, 0),
        )

    def _pointer(self, block: int) -> int:
        return self.storage_pointer + block * self._block_panels * panel_bytes(self.dtype_code, self.in_features)

    def _plain(self, block: int) -> PackedWeight:
        """A block in borrowed memory: zeros, or anything where all of it will be written."""
        step = self._block_panels * _PANEL_ROWS
        rows = min(step, self.out_features - block * step)
        plain = empty_weight_in(self.arena, rows, self.in_features, dtype=self.dtype, segments=self.segments)
        has_padding = rows % _PANEL_ROWS != 0 or self.in_features % _PANEL_ROWS != 0
        if has_padding or not self.is_filled:
            plain.storage.zero_()
        return plain


def compression_gains() -> bool:
    """Whether this machine's kernels are faster over compressed weights; all of them can multiply by such."""
    return native().isa_level in _GAINING


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
    if in_features > LARGEST_DEPTH:
        raise ValueError(f"in_features={in_features} is more than a compact weight can have, {LARGEST_DEPTH}")
    arena = arena or WeightArena()
    num_bytes, _ = packed_sizes(COMPACT_BFLOAT16, out_features, in_features, segments)
    storage = arena.take(num_bytes)
    return CompactWeight(out_features, in_features, torch.bfloat16, segments, 0, storage, None, arena, is_filled)
