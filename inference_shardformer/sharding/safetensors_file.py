"""Reads slices of one safetensors file straight into place: no mapping, so peak memory is what is kept."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from inference_shardformer.errors import CheckpointError
from inference_shardformer.sharding.plan import TensorInfo

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
_SMALL_GAP_BYTES = 16 * 2**10  # copying as much takes no longer than a call of its own for what follows
_REMEDY = "download or copy the file again, and compare its size and checksum with the original"


class _Entry(NamedTuple):
    info: TensorInfo
    begin: int  # first byte in the file
    end: int


class Scratch(threading.local):
    """Memory that every read of a thread reuses: allocating for each piece would leave holes between the parameters."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in that memory; it ends what the thread took before."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._bytes.numel() < num_bytes:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
        return self._bytes[:num_bytes].view(dtype).view(shape)


class SafetensorsFile:
    """One open safetensors file (format: 8-byte little-endian header length, JSON header, raw tensors).

    The header is checked against the file's size, so that a truncated file is refused before anything is read. What a
    read returns lies in `scratch` and is valid until the thread's next read from it. `bytes_read` counts what was
    returned.
    """

    def __init__(self, path: Path, scratch: Scratch | None = None) -> None:
        self.path = path
        self._scratch = scratch or Scratch()
        self._counting = threading.Lock()
        self.bytes_read = 0
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as exc:
            raise CheckpointError(f"{path}: cannot be opened: {exc.strerror}", remedy=_REMEDY) from exc
        try:
            self._entries = self._read_header()
        except CheckpointError:
            os.close(self._fd)
            raise
        self._tensors = {name: entry.info for name, entry in self._entries.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name, shape and type of every tensor, from the header."""
        return self._tensors

    def announce_rows(self, name: str, start: int, stop: int) -> None:
        """Ask the system to read rows `[start, stop)` of the first axis ahead; does not wait for it."""
        if hasattr(os, "posix_fadvise"):
            entry = self._entries[name]
            row = (entry.end - entry.begin) // max(1, (*entry.info.shape, 1)[0])
            os.posix_fadvise(self._fd, entry.begin + start * row, (stop - start) * row, os.POSIX_FADV_WILLNEED)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `[start, stop)` of the first axis, in the file's own type."""
        out = self._rows(name, start, stop)
        self._count(out.nbytes)
        return out

    def read_columns(self, name: str, start: int, stop: int, rows: tuple[int, int]) -> torch.Tensor:
        """Columns `[start, stop)` of the rows `[rows[0], rows[1])` of a matrix, in the file's own type.

        Where the columns between them are few, whole rows are read, and what is returned is a view of those.
        """
        entry = self._entries[name]
        dtype = TORCH_DTYPES[entry.info.dtype]
        width, part = (count * dtype.itemsize for count in (entry.info.shape[1], stop - start))
        self._count((rows[1] - rows[0]) * part)
        if width - part <= _SMALL_GAP_BYTES:
            return self._rows(name, *rows)[:, start:stop]
        out = self._scratch.take((rows[1] - rows[0], stop - start), dtype)
        view, first = _bytes_of(out), entry.begin + start * dtype.itemsize
        for index, row in enumerate(range(*rows)):
            self._read_into(view[index * part : (index + 1) * part], first + row * width, name)
        return out

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self.bytes_read += num_bytes

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        entry = self._entries[name]
        out = self._scratch.take((stop - start, *entry.info.shape[1:]), TORCH_DTYPES[entry.info.dtype])
        row = out.nbytes // max(1, stop - start)
        self._read_into(_bytes_of(out), entry.begin + start * row, name)
        return out

    def _read_into(self, view: memoryview, offset: int, name: str) -> None:
        while view:
            count = os.preadv(self._fd, [view], offset)
            if count == 0:
                raise CheckpointError(f"{self.path}: ended while reading {name} at byte {offset}", remedy=_REMEDY)
            offset += count
            view = view[count:]

    def _read_header(self) -> dict[str, _Entry]:
        size = os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{self.path}: {size} bytes cannot hold the header of {length} bytes that it announces", remedy=_REMEDY
            )
        try:
            header = json.loads(os.pread(self._fd, length, 8))
            entries = {
                name: _Entry(
                    TensorInfo(tuple(item["shape"]), item["dtype"]), *(8 + length + o for o in item["data_offsets"])
                )
                for name, item in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise CheckpointError(f"{self.path}: its header is not valid safetensors: {exc}", remedy=_REMEDY) from exc
        for name, entry in entries.items():
            self._check(name, entry, size)
        return entries

    def _check(self, name: str, entry: _Entry, size: int) -> None:
        dtype = TORCH_DTYPES.get(entry.info.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: {name} has type {entry.info.dtype}, which is not supported",
                remedy=f"convert the checkpoint to one of {', '.join(TORCH_DTYPES)}",
            )
        expected = dtype.itemsize
        for axis in entry.info.shape:
            expected *= axis
        if entry.end > size or entry.end - entry.begin != expected:
            raise CheckpointError(
                f"{self.path}: {name} needs {expected} bytes up to byte {entry.end}, the file has {size}: it is "
                "truncated or corrupt",
                remedy=_REMEDY,
            )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor as writable bytes."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read_metadata(path: Path) -> dict[str, str]:
    """The free text that a file carries beside its tensors; empty if it has none. The header was checked before."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(length)).get("__metadata__", {})
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
