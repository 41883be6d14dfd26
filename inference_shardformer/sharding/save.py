"""Saving sharded weights: gathered into a checkpoint for Hugging Face, or every rank its own part."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from inference_shardformer.errors import CheckpointError, PlanFileError
from inference_shardformer.sharding.checkpoint import rows_per_chunk
from inference_shardformer.sharding.gather import GatherGroup, WeightGatherer, can_hold, compute_dtype
from inference_shardformer.sharding.plan import ShardingPlan, SourceSlice, TensorInfo
from inference_shardformer.sharding.plan_file import PlanFile
from inference_shardformer.sharding.safetensors_file import SafetensorsFile, read_metadata
from inference_shardformer.sharding.safetensors_writer import SafetensorsWriter, split_files, write_index
from inference_shardformer.sharding.storage import parameter_value
from inference_shardformer.sharding.unshard import Original

PLAN_NAME = "plan.json"
_DIGEST = "plan_sha256"


def save_gathered(
    model: nn.Module,
    original: Original,
    group: GatherGroup,
    folder: Path,
    *,
    dtype: torch.dtype,
    keeps_types: bool,
    max_file_bytes: int,
) -> None:
    """Gather the weights tensor by tensor; rank 0 writes them. Every rank makes the same call.

    `dtype` is the type of the sharded parameters. With `keeps_types` a tensor is written in the type it had, where
    `dtype` holds all of its values; else in `dtype`. Raises `CheckpointError` if rank 0 cannot write, or if copies of
    one tensor differ between ranks.
    """
    gatherer = WeightGatherer(original.plans, group, lambda name: parameter_value(model, name))
    tensors = {
        name: (info.shape, compute_dtype(info) if keeps_types and can_hold(dtype, compute_dtype(info)) else dtype)
        for name, info in original.tensors.items()
        if name in gatherer.pieces
    }
    is_writing = group.rank == 0
    files = split_files(tensors, max_file_bytes)
    failures: list[CheckpointError] = []
    for file, held in files.items():
        writer = SafetensorsWriter(folder / file, held) if is_writing else None
        for name, (shape, kind) in held.items():
            values = gatherer.tensor(name, shape, dtype=dtype, keep=is_writing)
            if writer is not None and values is not None:
                writer.write(name, values.to(kind))
        if writer is not None:
            failures += _closed(writer)
    gatherer.close()
    if failures:
        raise failures[0]
    if is_writing:
        write_index(folder, files)


def save_rank(model: nn.Module, plan: ShardingPlan, plan_file: PlanFile, folder: Path, *, dtype: torch.dtype) -> None:
    """Write this rank's parameters, and on rank 0 the plan. Raises `CheckpointError`."""
    text = plan_file.document.to_text()
    tensors = {parameter.name: (parameter.shape, dtype) for parameter in plan.parameters}
    path = folder / rank_file_name(*plan.layout[::-1])
    with SafetensorsWriter(path, tensors, metadata={_DIGEST: _digest(text)}) as writer:
        for name in tensors:
            writer.write(name, parameter_value(model, name))
    if plan.layout.tp_rank == 0:
        plan_file.write(folder / PLAN_NAME)


def rank_file_name(tp_rank: int, tp_size: int) -> str:
    """The file of one rank."""
    return f"rank-{tp_rank:05d}-of-{tp_size:05d}.safetensors"


class RankCheckpoint:
    """What `save_rank` wrote for one rank, as a source of the slices that the plan names.

    Raises `PlanFileError` where the folder was written for another number of ranks, `CheckpointError` where the file of
    this rank is missing or belongs to another plan.
    """

    def __init__(self, folder: Path, plan_file: PlanFile, *, tp_rank: int, tp_size: int) -> None:
        document = plan_file.document
        if document.tp_size != tp_size:
            raise PlanFileError(
                f"{folder}: was saved by {document.tp_size} rank(s), and is loaded on {tp_size}",
                remedy=f"start {document.tp_size} ranks, or save a gathered checkpoint with save_pretrained()",
            )
        path = folder / rank_file_name(tp_rank, tp_size)
        self._file = SafetensorsFile(path)
        self._places: dict[SourceSlice, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = dict(document.tensors)
        for name, entry in document.parameters.items():
            self._places.update({SourceSlice(*part): name for part in entry.ranks[tp_rank].slices})
        self._check(path, _digest(document.to_text()), set(document.parameters))

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors that the parts are parts of, in the type of the file."""
        held = next(iter(self._file.tensors.values())).dtype
        return {name: TensorInfo(shape, held) for name, shape in self._shapes.items()}

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far."""
        return self._file.bytes_read

    def announce(self, part: SourceSlice) -> None:
        """Let the disk begin with the rows that hold the slice."""
        name = self._places[part]
        rows = (part.offset, part.offset + part.stop - part.start)
        self._file.announce_rows(name, *(rows if part.dim == 0 else (0, self._file.tensors[name].shape[0])))

    def chunks(self, part: SourceSlice) -> Iterator[tuple[int, torch.Tensor]]:
        """The slice in bounded pieces along the first axis; each is valid until the next."""
        name = self._places[part]
        shape = self._file.tensors[name].shape
        size = part.stop - part.start
        first, last = (part.offset, part.offset + size) if part.dim == 0 else (0, shape[0])
        for start in range(first, last, rows := rows_per_chunk(shape)):
            stop = min(start + rows, last)
            if part.dim == 0:
                yield start - first, self._file.read_rows(name, start, stop)
            else:
                yield start, self._file.read_columns(name, part.offset, part.offset + size, (start, stop))

    def release(self, part: SourceSlice) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()

    def _check(self, path: Path, digest: str, names: set[str]) -> None:
        found = read_metadata(path).get(_DIGEST)
        if found != digest or set(self._file.tensors) != names:
            self.close()
            raise CheckpointError(
                f"{path}: does not belong to {PLAN_NAME} beside it",
                remedy="keep the files that one save_sharded() wrote together, and save again if they were mixed",
            )


def max_bytes(size: int | str) -> int:
    """A size as bytes: an integer, or a text such as `5GB` or `500MiB`. Raises `CheckpointError` for any other."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    if isinstance(size, int) and size > 0:
        return size
    text = str(size).strip().upper()
    unit = next((unit for unit in sorted(units, key=len, reverse=True) if text.endswith(unit)), "")
    number = text.removesuffix(unit).strip()
    if unit and number.replace(".", "", 1).isdigit() and float(number) > 0:
        return int(float(number) * units[unit])
    raise CheckpointError(f"max_shard_size={size!r} is no size", remedy="write bytes, or a text such as '5GB'")


def _closed(writer: SafetensorsWriter) -> list[CheckpointError]:
    try:
        writer.close()
    except CheckpointError as exc:
        return [exc]
    return []


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()
