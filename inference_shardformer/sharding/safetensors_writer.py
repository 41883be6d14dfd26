"""Writes safetensors files as a stream: every header first, then one tensor after another, none kept in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from inference_shardformer.errors import CheckpointError
from inference_shardformer.sharding.checkpoint import INDEX_NAME, SINGLE_NAME
from inference_shardformer.sharding.safetensors_file import TORCH_DTYPES

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_PARTIAL = ".partial"

Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor that will be written."""
Announced = Mapping[str, Kind]
"""Those of every tensor of a file, in its order."""


class SafetensorsWriter:
    """One file. Tensors must come in the order in which they were announced.

    The file gets its name when it is complete; until then, and after a failure, it has another. A failed write is kept
    for `close`, which raises it, so that ranks that work along are not left alone in the middle.
    """

    def __init__(
        self,
        path: Path,
        tensors: Announced,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.error: OSError | None = None
        self._waiting = list(tensors)
        self._partial = path.with_name(path.name + _PARTIAL)
        self._file: BinaryIO | None = None
        try:
            self._file = self._partial.open("wb")
            self._file.write(_header(tensors, {"format": "pt", **(metadata or {})}))
        except OSError as exc:
            self.error = exc

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor. Raises `CheckpointError` for one that is not the next."""
        if not self._waiting or self._waiting[0] != name:
            raise CheckpointError(f"{self.path}: {name} does not come next in this file", remedy="report this")
        self._waiting.pop(0)
        if self.error is not None or self._file is None:
            return
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        try:
            self._file.write(raw.data)
        except OSError as exc:
            self.error = exc

    def close(self) -> None:
        """Complete the file. Raises `CheckpointError` if it could not be written, or if tensors are missing."""
        if self._file is not None:
            self._file.close()
        problem = f"cannot be written ({self.error.strerror or self.error})" if self.error else ""
        if self._waiting and not problem:
            problem = f"is incomplete, {self._waiting[0]} was never written"
        if problem:
            self._partial.unlink(missing_ok=True)
            raise CheckpointError(f"{self.path}: {problem}", remedy="check the folder, its rights and the free space")
        self._partial.replace(self.path)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None:
            self.close()
        elif self._file is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)


def split_files(tensors: Announced, max_bytes: int) -> dict[str, dict[str, Kind]]:
    """The tensors of every file by the file's name, in order; a file exceeds `max_bytes` only with a single tensor."""
    groups: list[dict[str, Kind]] = [{}]
    size = 0
    for name, (shape, dtype) in tensors.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + num_bytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape, dtype
        size += num_bytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    stem, _, suffix = SINGLE_NAME.rpartition(".")
    return {f"{stem}-{place:05d}-of-{len(groups):05d}.{suffix}": group for place, group in enumerate(groups, start=1)}


def write_index(folder: Path, files: Mapping[str, Announced]) -> None:
    """The index of several files; of a single one there is none. Raises OSError."""
    index = folder / INDEX_NAME
    if len(files) == 1:
        index.unlink(missing_ok=True)  # of an earlier checkpoint in this folder
        return
    everything = [tensor for tensors in files.values() for tensor in tensors.values()]
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in everything)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _header(tensors: Announced, metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a header, filled up with spaces so that tensors begin at a multiple of eight bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
