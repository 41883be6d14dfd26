"""Filling parameters by several threads: the same values, told in order, the first error, the threads as before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model

from inference_shardformer import ConfigSources, InferenceConfig, InferenceShardformer, ShardConfig
from inference_shardformer.errors import CheckpointError
from inference_shardformer.sharding.safetensors_file import SafetensorsFile
from inference_shardformer.sharding.storage import parameter_value

THREADS = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model("odd_vocabulary_tied", tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(folder: Path, threads: int) -> tuple[dict[str, torch.Tensor], list[int], int]:
    """Every parameter, the progress that was told, and the bytes read."""
    told: list[int] = []
    shard = ShardConfig(device="cpu", threads_per_rank=threads)
    sources = ConfigSources(environ={})
    with InferenceShardformer(shard, InferenceConfig(dtype="bf16"), sources=sources) as shardformer:
        model = shardformer.from_pretrained(folder, progress=lambda done, total: told.append(done))
        plan = shardformer.sharded.plan
        values = {each.name: parameter_value(model, each.name).clone() for each in plan.parameters}
        return values, told, shardformer.sharded.bytes_read


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the threads that read; each waits for a moment, so that several do."""
    names: set[str] = set()
    read = SafetensorsFile.read_rows

    def noting(self: SafetensorsFile, name: str, start: int, stop: int) -> torch.Tensor:
        names.add(threading.current_thread().name)
        threading.Event().wait(0.002)
        return read(self, name, start, stop)

    monkeypatch.setattr(SafetensorsFile, "read_rows", noting)
    return names


def test_several_threads_give_what_one_gives(folder: Path, readers: set[str]) -> None:
    expected, told_by_one, read_by_one = load(folder, 1)
    assert readers == {threading.current_thread().name}
    readers.clear()
    values, told, num_bytes = load(folder, THREADS)
    assert len(readers) == THREADS
    assert threading.current_thread().name not in readers
    assert (told, num_bytes) == (told_by_one, read_by_one)
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    assert torch.get_num_threads() == THREADS


def test_inside_of_inference_mode(folder: Path) -> None:
    expected, *_ = load(folder, 1)
    with torch.inference_mode():
        values, *_ = load(folder, THREADS)
        assert all(torch.equal(values[name], expected[name]) for name in expected)


def test_what_one_thread_raises_is_raised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: SafetensorsFile, name: str, start: int, stop: int) -> torch.Tensor:
        raise CheckpointError(f"{name} cannot be read", remedy="copy it again")

    monkeypatch.setattr(SafetensorsFile, "read_rows", broken)
    torch.set_num_threads(THREADS)
    before = threading.active_count()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(folder, THREADS)
    assert threading.active_count() <= before
    assert torch.get_num_threads() == THREADS
