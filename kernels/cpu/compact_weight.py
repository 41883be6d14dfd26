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

_LARGEST_DEPTH = 1 << 18  # kMaxCompactDepth
_GAINING = frozenset({"avx512", "avx512_bf16", "amx"})  # levels whose instructions expand faster than memory reads


class _Contents:
    """What changes: a draft, plain packed, while it is written, and then the lists that are too long for panels."""

    def __init__(self) -> None:
        self.draft: PackedWeight | None = None
        self.exceptions: torch.Tensor | None = None  # int32


@dataclass(frozen=True, eq=False)
class CompactWeight(PackedWeight):
    """The weight `[out_features, in_features]` of a linear layer, packed, and compressed by `settle`.

    Until then kernels see what was settled before, zeros at first. `is_filled` says that every element will be written
    before the first `settle`.
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
        exceptions = self.contents.exceptions
        return self.storage.numel() + (0 if exceptions is None else exceptions.numel() * 4)

    def write(self, slab: torch.Tensor, *, row: int = 0, column: int = 0) -> None:
        """Put rows `row` and columns `column` onwards from a plain slab into a draft, which `settle` compresses.

        Raises `ValueError` for a slab that does not fit or has another type.
        """
        if self.contents.draft is None:
            is_whole = tuple(slab.shape) == (self.out_features, self.in_features)
            self.contents.draft = self._draft() if is_whole else self._expanded()
        self.contents.draft.write(slab, row=row, column=column)

    def settle(self) -> None:
        """Compress what was written, into the memory that the weight always has. Raises `MemoryError`."""
        contents = self.contents
        if contents.draft is None:
            return
        exceptions = torch.empty(0, dtype=torch.int32)
        needed = self._compress(contents.draft, exceptions)
        if needed > 0:
            exceptions = torch.empty(needed, dtype=torch.int32)
            self._compress(contents.draft, exceptions)
        contents.exceptions = exceptions
        self.arena.take_back(contents.draft.storage)
        contents.draft = None

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

    def _compress(self, draft: PackedWeight, exceptions: torch.Tensor) -> int:
        """Compress with room for so many exceptions; says how many need it."""
        needed = ctypes.c_int64(0)
        _compress(
            *(draft.storage_pointer, self.storage_pointer, exceptions.data_ptr(), ctypes.addressof(needed)),
            *(self.out_features, self.in_features, exceptions.numel(), self.segments, 0),
        )
        if needed.value > 2 * draft.storage.numel():
            raise MemoryError(f"there is no memory to compress a panel of {self.in_features} columns")
        return needed.value

    def _expanded(self) -> PackedWeight:
        """A draft of the same values."""
        draft = self._draft()
        if self.contents.exceptions is not None:
            _expand(
                *(draft.storage_pointer, self.storage_pointer, None, None),
                *(self.out_features, self.in_features, 0, self.segments, 0),
            )
        return draft

    def _draft(self) -> PackedWeight:
        """A plain packed weight in borrowed memory: zeros, or anything where all of it will be written."""
        code = WEIGHT_DTYPES[self.dtype]
        num_bytes, num_panels = packed_sizes(code, self.out_features, self.in_features, self.segments)
        storage = self.arena.lend(num_bytes)
        has_padding = self.in_features % 32 != 0 or num_panels * 32 != self.out_features
        if has_padding or not (self.is_filled or self.contents.exceptions is not None):
            storage[:num_bytes].zero_()
        return PackedWeight(self.out_features, self.in_features, self.dtype, self.segments, 0, storage, None)


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
