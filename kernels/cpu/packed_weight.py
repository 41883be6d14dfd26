"""A linear layer's weight in the order in which the kernels read it: packed once while loading, the only copy."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field

import torch

from inference_shardformer.kernels.cpu.library import NativeKernel, native
from inference_shardformer.kernels.cpu.linear_arguments import WEIGHT_DTYPES, PackArgs
from inference_shardformer.kernels.cpu.rows import dtype_of, rows_of
from inference_shardformer.kernels.host_memory import HUGE_PAGE, zeroed_bytes

_pack = NativeKernel("linear_pack", PackArgs)
_unpack = NativeKernel("linear_unpack", PackArgs)
_quantize = NativeKernel("linear_quantize", PackArgs)
_dequantize = NativeKernel("linear_dequantize", PackArgs)

_ALIGNMENT = 64
_CHUNK = 64 << 20
_LARGEST_INT8_DEPTH = 1 << 17  # sums of products of int8 stay below 2^31


class WeightArena:
    """Memory for packed weights in large pieces of huge pages, which small tensors of their own could not have.

    A weight stays in memory as long as any weight of the same piece; pages that hold nothing are never touched.
    Besides, it lends memory for drafts of weights, to several threads at a time; until all are loaded it keeps that.
    """

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._unused: list[torch.Tensor] = []
        self._keeps_lent = True
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> torch.Tensor:
        """A `uint8` tensor of zeros, aligned to cache lines."""
        rounded = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if rounded > self._piece.numel():
            self._piece = zeroed_bytes(max(_CHUNK, rounded), huge_pages=True)
        taken, self._piece = self._piece[:num_bytes], self._piece[rounded:]
        return taken

    def lend(self, num_bytes: int) -> torch.Tensor:
        """At least so many bytes, with anything in them, until `take_back`."""
        with self._lock:
            fitting = [each for each in self._unused if each.numel() >= num_bytes]
            if fitting:
                best = min(fitting, key=torch.Tensor.numel)
                self._unused = [each for each in self._unused if each is not best]
                return best
            self._unused.clear()  # too small: rather than hold more and more
        return zeroed_bytes(num_bytes, huge_pages=num_bytes >= HUGE_PAGE)

    def take_back(self, lent: torch.Tensor) -> None:
        """What was lent is lent again, or let go."""
        with self._lock:
            if self._keeps_lent:
                self._unused.append(lent)

    def keep_nothing(self) -> None:
        """Let go of what is not lent, and of what is given back from now on."""
        with self._lock:
            self._keeps_lent = False
            self._unused.clear()


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The weight `[out_features, in_features]` of a linear layer, packed.

    With two segments it holds the rows of a gate and then as many of an up projection. int8 codes are symmetric, with a
    scale per row (`group_size` 0), or per `group_size` columns of a row.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype  # of the packed elements: float32, bfloat16, float16, or int8
    segments: int
    group_size: int
    storage: torch.Tensor  # uint8
    scales: torch.Tensor | None  # float32 [panels, groups, 32], in packed order
    dtype_code: int = field(init=False)
    storage_pointer: int = field(init=False)
    scales_pointer: int | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype_code", WEIGHT_DTYPES[self.dtype])
        object.__setattr__(self, "storage_pointer", self.storage.data_ptr())
        object.__setattr__(self, "scales_pointer", None if self.scales is None else self.scales.data_ptr())

    @property
    def num_bytes(self) -> int:
        """Memory of codes and scales."""
        return self.storage.numel() + (0 if self.scales is None else self.scales.numel() * 4)

    def write(self, slab: torch.Tensor, *, row: int = 0, column: int = 0) -> None:
        """Put rows `row` and columns `column` onwards from a plain slab `[rows, columns]`, quantising it for int8.

        Raises `ValueError` for a slab that does not fit or has another type, or, for int8, cuts a group of columns.
        """
        is_quantized = self.dtype == torch.int8
        args = self._check_slab(slab, row, column)
        size = self.group_size or self.in_features
        end = column + slab.shape[1]
        if is_quantized and (column % size != 0 or (end % size != 0 and end != self.in_features)):
            raise ValueError(
                f"columns {column} to {end} cut a group of {size} that share a scale; write whole groups of columns"
            )
        (_quantize if is_quantized else _pack)(*args)

    def settle(self) -> None:
        """Everything is written that will be. Raises `ValueError` for int8 codes of values that are not finite."""
        if self.scales is not None and not self.scales.isfinite().all():
            row = int((~self.read().isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"row {row} of this rank holds a value that is not finite, which int8 has no code for")

    def read(self, *, row: int = 0, num_rows: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows of the plain weight `[num_rows, in_features]`, bit for bit; int8 codes times scales, in `dtype`.

        Raises `ValueError` for rows that are not there, and for a `dtype` other than the weight's unless it is int8.
        """
        is_quantized = self.dtype == torch.int8
        dtype = dtype or (torch.float32 if is_quantized else self.dtype)
        if not is_quantized and dtype != self.dtype:
            raise ValueError(f"a weight of {self.dtype} is read as it is, not as {dtype}; convert what is read")
        count = self.out_features - row if num_rows is None else num_rows
        slab = torch.empty(count, self.in_features, dtype=dtype)
        (_dequantize if is_quantized else _unpack)(*self._slab(slab, row, 0))
        return slab

    def _check_slab(self, slab: torch.Tensor, row: int, column: int) -> tuple[object, ...]:
        """The arguments for writing a slab. Raises `ValueError` if it cannot be."""
        if self.dtype not in (torch.int8, slab.dtype):
            raise ValueError(f"a slab of {slab.dtype} cannot be packed into a weight of {self.dtype}; convert it first")
        return self._slab(slab, row, column)

    def _slab(self, slab: torch.Tensor, row: int, column: int) -> tuple[object, ...]:
        """The arguments for moving a slab at a place."""
        if slab.dim() != 2 or min(row, column) < 0 or not self._holds(row + slab.shape[0], column + slab.shape[1]):
            raise ValueError(
                f"a slab of shape {tuple(slab.shape)} at row {row}, column {column} does not fit a weight of shape "
                f"({self.out_features}, {self.in_features})"
            )
        code, (rows, columns, stride) = dtype_of("slab", slab), rows_of("slab", slab)
        return (
            *(self.storage_pointer, self.scales_pointer, slab.data_ptr(), self.out_features, self.in_features),
            *(row, column, rows, columns, stride, self.group_size, code, self.segments),
        )

    def _holds(self, rows: int, columns: int) -> bool:
        return rows <= self.out_features and columns <= self.in_features


def empty_weight(
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype,
    segments: int = 1,
    group_size: int = 0,
    arena: WeightArena | None = None,
) -> PackedWeight:
    """A packed weight of zeros, to be written in slabs. `dtype` int8 quantises what is written.

    Raises `ValueError` for sizes that the kernels cannot serve.
    """
    code = WEIGHT_DTYPES.get(dtype)
    if code is None:
        raise ValueError(f"dtype={dtype} cannot be packed; choose one of {', '.join(map(str, WEIGHT_DTYPES))}")
    check_sizes(out_features, in_features, segments)
    if group_size < 0 or group_size % 4 != 0 or (group_size != 0 and dtype != torch.int8):
        raise ValueError(f"group_size={group_size} is no positive multiple of 4 for int8, or 0 for one scale per row")
    if dtype == torch.int8 and in_features > _LARGEST_INT8_DEPTH:
        raise ValueError(f"in_features={in_features} is more than int8 can sum, {_LARGEST_INT8_DEPTH}; keep the type")
    num_bytes, num_panels = packed_sizes(code, out_features, in_features, segments)
    groups = -(-in_features // group_size) if group_size else 1
    scales = torch.zeros(num_panels, groups, 32) if dtype == torch.int8 else None
    storage = (arena or WeightArena()).take(num_bytes) if arena or num_bytes >= HUGE_PAGE else _small(num_bytes)
    return PackedWeight(out_features, in_features, dtype, segments, group_size, storage, scales)


def empty_weight_in(
    arena: WeightArena, out_features: int, in_features: int, *, dtype: torch.dtype, segments: int
) -> PackedWeight:
    """A packed weight in memory that the arena lends, with anything in it."""
    num_bytes, _ = packed_sizes(WEIGHT_DTYPES[dtype], out_features, in_features, segments)
    return PackedWeight(out_features, in_features, dtype, segments, 0, arena.lend(num_bytes), None)


def num_bytes_of(
    out_features: int, in_features: int, *, dtype: torch.dtype, segments: int = 1, group_size: int = 0
) -> int:
    """What `PackedWeight.num_bytes` of such a weight will be."""
    num_bytes, panels = packed_sizes(WEIGHT_DTYPES[dtype], out_features, in_features, segments)
    groups = -(-in_features // group_size) if group_size else 1
    return num_bytes + (panels * groups * 32 * 4 if dtype == torch.int8 else 0)


def pack(
    weight: torch.Tensor,  # [out_features, in_features]
    *,
    segments: int = 1,
    quantization: str | None = None,
    group_size: int = 0,
    arena: WeightArena | None = None,
) -> PackedWeight:
    """Pack a plain weight; `quantization` is `None` or `"int8"`. Raises `ValueError` for what cannot be packed."""
    if quantization not in (None, "int8"):
        raise ValueError(f"quantization={quantization!r} is unknown; choose None or 'int8'")
    dtype = weight.dtype if quantization is None else torch.int8
    packed = empty_weight(*weight.shape, dtype=dtype, segments=segments, group_size=group_size, arena=arena)
    packed.write(weight)
    return packed


def check_sizes(out_features: int, in_features: int, segments: int) -> None:
    """Raises `ValueError` for a shape that no weight of so many segments has."""
    if segments not in (1, 2) or out_features < 1 or in_features < 1 or out_features % segments != 0:
        raise ValueError(
            f"segments={segments} and shape ({out_features}, {in_features}) do not go together; the number of rows "
            "must be a positive multiple of segments, which is 1 or 2"
        )


def packed_sizes(dtype_code: int, out_features: int, in_features: int, segments: int) -> tuple[int, int]:
    """Bytes of a packed weight without its scales, and panels of 32 rows."""
    sizes = (ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    num_bytes, num_panels = (
        native().function(f"isf_packed_{what}", argtypes=sizes, restype=ctypes.c_int64) for what in ("bytes", "panels")
    )
    shape = dtype_code, out_features, in_features, segments
    return int(num_bytes(*shape)), int(num_panels(*shape))


def panel_bytes(dtype_code: int, in_features: int) -> int:
    """Bytes of a panel of 32 rows, without scales: from the start of one to the start of the next."""
    sizes = (ctypes.c_int32, ctypes.c_int64)
    return int(native().function("isf_panel_bytes", argtypes=sizes, restype=ctypes.c_int64)(dtype_code, in_features))


def _small(num_bytes: int) -> torch.Tensor:
    """Zeroed memory aligned to cache lines, as torch aligns everything."""
    return torch.zeros(num_bytes, dtype=torch.uint8)
