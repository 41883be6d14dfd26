"""A checkpoint folder of pickled weights, read only where that was asked for: torch.save files and their index."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from zipfile import BadZipFile

import torch

from inference_shardformer.errors import CheckpointError
from inference_shardformer.sharding.checkpoint import SafetensorsCheckpoint, indexed_names, safetensors_names
from inference_shardformer.sharding.plan import SourceSlice, TensorInfo

PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLE_SINGLE_NAME = "pytorch_model.bin"


class PickledCheckpoint:
    """All files of a folder behind one set of names. Files are mapped into memory: what is not read costs nothing.

    Unpickling is restricted to tensors (`weights_only`), which older torch did not promise to be safe: give folders
    whose origin is known.
    """

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for name in _file_names(folder):
            self._tensors.update(_load(folder / name))
        self._counting = Lock()
        self.bytes_read = 0

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name, shape and type of every tensor."""
        return {name: TensorInfo(tuple(tensor.shape), str(tensor.dtype)) for name, tensor in self._tensors.items()}

    def announce(self, part: SourceSlice) -> None:
        """Nothing to prepare: pages are read where they are touched."""

    def chunks(self, part: SourceSlice) -> Iterator[tuple[int, torch.Tensor]]:
        """The slice as one piece."""
        piece = self._tensors[part.tensor].narrow(part.dim, part.start, part.stop - part.start)
        with self._counting:
            self.bytes_read += piece.nbytes
        yield 0, piece

    def release(self, part: SourceSlice) -> None:
        """Nothing to give back before `close`: the pages belong to the files."""

    def close(self) -> None:
        """Let go of every file. Idempotent."""
        self._tensors = {}


def open_checkpoint(folder: Path, *, allow_pickle: bool) -> SafetensorsCheckpoint | PickledCheckpoint:
    """The weights of a folder; pickled ones only where there are no others, and only if they are allowed."""
    if allow_pickle and not safetensors_names(folder):
        return PickledCheckpoint(folder)
    return SafetensorsCheckpoint(folder)


def _file_names(folder: Path) -> list[str]:
    if (folder / PICKLE_INDEX_NAME).is_file():
        return indexed_names(folder / PICKLE_INDEX_NAME)
    if (folder / PICKLE_SINGLE_NAME).is_file():
        return [PICKLE_SINGLE_NAME]
    raise CheckpointError(
        f"{folder}: holds neither {PICKLE_SINGLE_NAME} nor {PICKLE_INDEX_NAME}, and no safetensors weights",
        remedy="give the folder that the weights lie in; of ColossalAI's applications that is `modeling`",
    )


def _load(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, BadZipFile, pickle.UnpicklingError) as exc:
        raise CheckpointError(
            f"{path}: cannot be read as plain tensors: {exc}",
            remedy="convert it with transformers: model.save_pretrained(folder, safe_serialization=True)",
        ) from exc
    if isinstance(loaded, Mapping) and all(isinstance(value, torch.Tensor) for value in loaded.values()):
        return loaded
    raise CheckpointError(f"{path}: holds more than tensors by their names", remedy="save model.state_dict() alone")
