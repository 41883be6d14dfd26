"""Reading slices of safetensors files, and refusing broken ones before anything is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inference_shardformer.errors import CheckpointError
from inference_shardformer.sharding.checkpoint import SafetensorsCheckpoint
from inference_shardformer.sharding.plan import SourceSlice
from inference_shardformer.sharding.safetensors_file import SafetensorsFile


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(12, 10, generator=generator),
        "half": torch.randn(6, 8, generator=generator).to(torch.bfloat16),
        "vector": torch.randn(7, generator=generator),
    }


@pytest.fixture
def path(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_header_lists_every_tensor(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = SafetensorsFile(path)
    assert {name: info.shape for name, info in file.tensors.items()} == {n: tuple(t.shape) for n, t in tensors.items()}


@pytest.mark.parametrize("name", ["matrix", "half", "vector"])
def test_rows_equal_the_tensor(path: Path, tensors: dict[str, torch.Tensor], name: str) -> None:
    assert torch.equal(SafetensorsFile(path).read_rows(name, 2, 5), tensors[name][2:5])


@pytest.mark.parametrize("name", ["matrix", "half"])
def test_columns_equal_the_tensor(path: Path, tensors: dict[str, torch.Tensor], name: str) -> None:
    assert torch.equal(SafetensorsFile(path).read_columns(name, 3, 7, (1, 5)), tensors[name][1:5, 3:7])


def test_only_the_bytes_of_the_slice_are_read(path: Path) -> None:
    file = SafetensorsFile(path)
    file.read_columns("matrix", 2, 4, (0, 12))
    assert file.bytes_read == 12 * 2 * 4


@pytest.mark.parametrize(("dim", "rows"), [(0, (3, 9)), (1, (0, 12))])
def test_an_announced_slice_is_read_ahead(
    path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, dim: int, rows: tuple[int, int]
) -> None:
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, size, advice: asked.append((offset, size, advice)))
    checkpoint = SafetensorsCheckpoint(path.parent)
    checkpoint.announce(SourceSlice("matrix", dim, 3, 9, 0))
    checkpoint.close()
    ((offset, size, advice),) = asked
    expected = tensors["matrix"][rows[0] : rows[1]].numpy().tobytes()
    assert path.read_bytes()[offset : offset + size] == expected
    assert advice == os.POSIX_FADV_WILLNEED


def test_chunks_put_together_are_the_slice(
    path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference_shardformer.sharding.checkpoint._CHUNK_BYTES", 160)
    checkpoint = SafetensorsCheckpoint(path.parent)
    for dim, expected in ((0, tensors["matrix"][3:9]), (1, tensors["matrix"][:, 3:9])):
        slice_ = SourceSlice("matrix", dim, 3, 9, 0)
        pieces = [(row, piece.clone()) for row, piece in checkpoint.chunks(slice_)]
        assert len(pieces) > 1
        assert [row for row, _ in pieces] == list(range(0, expected.shape[0], 2))
        assert torch.equal(torch.cat([piece for _, piece in pieces]), expected)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes cannot hold"),
        (b"\x00" * 4, "4 bytes cannot hold"),
        ((10**9).to_bytes(8, "little") + b"{}", "header of 1000000000 bytes"),
        ((9).to_bytes(8, "little") + b"not json!", "not valid safetensors"),
        ((6).to_bytes(8, "little") + b'{"a":1' + b"}", "not valid safetensors"),
    ],
)
def test_broken_headers_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        SafetensorsFile(broken)


def test_truncated_file_is_refused_on_opening(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        SafetensorsFile(path)


def test_unsupported_type_is_refused_by_name(tmp_path: Path) -> None:
    header = json.dumps({"weight": {"dtype": "I4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\x00")
    with pytest.raises(CheckpointError, match="type I4"):
        SafetensorsFile(file)


def test_missing_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened"):
        SafetensorsFile(tmp_path / "absent.safetensors")


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        SafetensorsCheckpoint(tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match="pickled weights only") as caught:
        SafetensorsCheckpoint(tmp_path)
    assert "save_pretrained" in caught.value.remedy


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a valid index"):
        SafetensorsCheckpoint(tmp_path)


def test_index_that_names_absent_files_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="do not exist: model-00001-of-00002"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("name", ["matrix", "half"])
def test_wide_gaps_are_left_out(
    path: Path, tensors: dict[str, torch.Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference_shardformer.sharding.safetensors_file._SMALL_GAP_BYTES", 3)
    found = SafetensorsFile(path).read_columns(name, 3, 7, (1, 5))
    assert found.is_contiguous()
    assert torch.equal(found, tensors[name][1:5, 3:7])
