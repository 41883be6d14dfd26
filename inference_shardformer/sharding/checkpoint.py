"""A checkpoint folder in Hugging Face format: where its tensors lie, and slices of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from inference_shardformer.errors import CheckpointError
from inference_shardformer.sharding.plan import SourceSlice, TensorInfo
from inference_shardformer.sharding.safetensors_file import SafetensorsFile, Scratch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth")
_CHUNK_BYTES = 8 * 2**20
ROWS_TOGETHER = 64  # of a packed weight; a group of them is stored without waiting for more


class SafetensorsCheckpoint:
    """All safetensors files of a folder behind one set of names. Only headers are read on opening."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, SafetensorsFile] = {}
        self._owner: dict[str, str] = {}
        scratch = Scratch()
        try:
            for name in _file_names(folder):
                self._files[name] = SafetensorsFile(folder / name, scratch)
                self._owner.update(dict.fromkeys(self._files[name].tensors, name))
        except CheckpointError:
            self.close()
            raise

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name, shape and type of every tensor, from the headers."""
        return {name: self._files[file].tensors[name] for name, file in self._owner.items()}

    @property
    def bytes_read(self) -> int:
        """Bytes of the slices read so far on this rank."""
        return sum(file.bytes_read for file in self._files.values())

    def announce(self, part: SourceSlice) -> None:
        """Let the disk begin with the rows that hold the slice."""
        file = self._files[self._owner[part.tensor]]
        first, last = (part.start, part.stop) if part.dim == 0 else (0, file.tensors[part.tensor].shape[0])
        file.announce_rows(part.tensor, first, last)

    def chunks(self, part: SourceSlice) -> Iterator[tuple[int, torch.Tensor]]:
        """The slice in bounded pieces along the first axis, each with its first row relative to the slice.

        A piece is valid until the same thread asks for another.
        """
        file = self._files[self._owner[part.tensor]]
        info = file.tensors[part.tensor]
        first, last = (part.start, part.stop) if part.dim == 0 else (0, info.shape[0])
        for start in range(first, last, rows := rows_per_chunk(info.shape)):
            stop = min(start + rows, last)
            if part.dim == 0:
                yield start - first, file.read_rows(part.tensor, start, stop)
            else:
                yield start, file.read_columns(part.tensor, part.start, part.stop, (start, stop))

    def release(self, part: SourceSlice) -> None:
        """Nothing to give back: files hold no tensor."""

    def close(self) -> None:
        """Close every file; idempotent."""
        for file in self._files.values():
            file.close()


class StateDictSource:
    """The tensors of a model in memory. A tensor is let go as soon as its last slice was read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name, shape and type of every tensor still held."""
        return {name: TensorInfo(tuple(tensor.shape), str(tensor.dtype)) for name, tensor in self._tensors.items()}

    @property
    def held(self) -> Mapping[str, torch.Tensor]:
        """The tensors that were not let go."""
        return self._tensors

    def announce(self, part: SourceSlice) -> None:
        """Nothing to prepare: the tensors are here."""

    def chunks(self, part: SourceSlice) -> Iterator[tuple[int, torch.Tensor]]:
        """The slice as one piece."""
        yield 0, self._tensors[part.tensor].detach().narrow(part.dim, part.start, part.stop - part.start)

    def release(self, part: SourceSlice) -> None:
        """Drop the reference to the slice's tensor."""
        self._tensors.pop(part.tensor, None)


def rows_per_chunk(shape: tuple[int, ...]) -> int:
    """Of about eight megabytes, whatever the type: in multiples of what kernels store together, where that fits."""
    rows = max(1, _CHUNK_BYTES // max(1, 8 * math.prod(shape[1:])))
    return rows // ROWS_TOGETHER * ROWS_TOGETHER or rows


def _file_names(folder: Path) -> list[str]:
    """Names of the safetensors files of a folder, through its index where there is one."""
    names = safetensors_names(folder)
    if names:
        return names
    found = sorted(path.name for pattern in _PICKLE_PATTERNS for path in folder.glob(pattern))
    if found:
        raise CheckpointError(
            f"{folder}: holds pickled weights only ({', '.join(found[:3])}); reading them can run any code",
            remedy="convert them once with transformers: model.save_pretrained(folder, safe_serialization=True); or, "
            "where you trust their origin, set inference.weights.allow_pickle=true",
        )
    raise CheckpointError(
        f"{folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}",
        remedy="give the folder of a checkpoint in Hugging Face format with safetensors weights",
    )


def safetensors_names(folder: Path) -> list[str]:
    """Names of the safetensors files of a folder, through its index where there is one; empty where there are none."""
    if (folder / INDEX_NAME).is_file():
        return indexed_names(folder / INDEX_NAME)
    return [SINGLE_NAME] if (folder / SINGLE_NAME).is_file() else []


def indexed_names(index: Path) -> list[str]:
    """Names of the files that an index lists. Raises `CheckpointError` where one is missing."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CheckpointError(f"{index}: is not a valid index: {exc}", remedy="download the file again") from exc
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: names {len(missing)} file(s) that do not exist: {', '.join(missing[:4])}",
            remedy="complete the download",
        )
    return names
