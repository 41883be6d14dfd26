"""A rank that finds no memory for a weight while it loads: the same typed error on all ranks, and nothing is lost."""

from __future__ import annotations

import threading

import pytest
from reversing import portrait
from tiny_models import save_tiny_model, tiny_model

from inference_shardformer import ConfigSources, InferenceConfig
from inference_shardformer.errors import CapacityError
from inference_shardformer.kernels.cpu.compact_weight import CompactWeight
from inference_shardformer.kernels.cpu.library import native_problem
from inference_shardformer.simulation import simulate

pytestmark = pytest.mark.skipif(native_problem() is not None, reason="the native kernels compress")
CPU = ConfigSources(environ={})
COMPRESSED = InferenceConfig(dtype="bf16", weights={"compression": "lossless"})


@pytest.fixture
def failing_rank(monkeypatch):
    """Rank 1, at its fifth block, as long as `failing_rank` holds its thread."""
    seats: dict[int, int] = {}
    compress = CompactWeight._compress_to

    def scarce(self, block, draft, exceptions):
        seat = threading.get_ident()
        if seat in seats:
            seats[seat] += 1
            if seats[seat] == 5:
                raise MemoryError("4096 bytes cannot be allocated")
        return compress(self, block, draft, exceptions)

    monkeypatch.setattr(CompactWeight, "_compress_to", scarce)
    return seats


def test_all_ranks_raise_the_same_and_the_model_is_as_it_was(failing_rank):
    before = portrait(tiny_model("gqa").bfloat16())

    def program(rank):
        model = tiny_model("gqa").bfloat16()
        if rank.tp_rank == 1:
            failing_rank[threading.get_ident()] = 0
        with rank.shardformer(None, COMPRESSED, sources=CPU) as mine:
            with pytest.raises(CapacityError, match=r"no memory for a weight of \d+ x \d+: 4096 bytes") as caught:
                mine.optimize(model)
            assert "over more ranks" in caught.value.remedy
        return str(caught.value), portrait(model)

    first, second = simulate(2, program)
    assert first == second
    assert first[1] == before


def test_a_checkpoint_is_loaded_by_the_next_call(failing_rank, tmp_path):
    save_tiny_model("gqa", tmp_path)

    def program(rank):
        with rank.shardformer(None, COMPRESSED, sources=CPU) as mine:
            if rank.tp_rank == 1:
                failing_rank[threading.get_ident()] = 0
            with pytest.raises(CapacityError, match="no memory for a weight of"):
                mine.from_pretrained(tmp_path)
        with rank.shardformer(None, COMPRESSED, sources=CPU) as again:
            return sum(parameter.nbytes for parameter in again.from_pretrained(tmp_path).parameters())

    first, second = simulate(2, program)
    assert first == second > 0
