"""The block allocator against a set model, and the sizes of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inference_shardformer.config.inference import CacheConfig
from inference_shardformer.errors import CapacityError, StateError
from inference_shardformer.kv_cache.block_allocator import BlockAllocator
from inference_shardformer.kv_cache.sizing import blocks_for, control_group_headroom, free_memory, size_cache
from inference_shardformer.kv_cache.spec import KVCacheSpec

SPEC = KVCacheSpec(num_layers=2, num_kv_heads=1, head_dim=8, block_size=4, dtype=torch.float32)  # 512 bytes a block


@given(st.integers(1, 30), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_blocks_are_owned_once_and_come_back(num_blocks: int, actions: list[tuple[bool, int]]) -> None:
    allocator = BlockAllocator(num_blocks)
    held: list[list[int]] = []
    for takes, number in actions:
        num_held = sum(map(len, held))
        if takes and number <= num_blocks - num_held:
            held.append(allocator.allocate(number))
        elif takes:
            with pytest.raises(CapacityError):
                allocator.allocate(number)
        elif held:
            allocator.free(held.pop(number % len(held)))
        allocator.check_integrity(held)
        assert allocator.num_free == num_blocks - sum(map(len, held))
        everything = [block for table in held for block in table]
        assert len(set(everything)) == len(everything)
        assert set(everything) <= set(range(num_blocks))


def test_order_is_lowest_first_then_warmest() -> None:
    allocator = BlockAllocator(6)
    assert allocator.allocate(4) == [0, 1, 2, 3]
    allocator.free([1, 3])
    assert allocator.allocate(3) == [1, 3, 4]


def test_more_than_free_takes_nothing() -> None:
    allocator = BlockAllocator(3)
    with pytest.raises(CapacityError, match="4 blocks were asked for, 3 of 3"):
        allocator.allocate(4)
    with pytest.raises(CapacityError):
        allocator.allocate(-1)
    assert allocator.num_free == 3


@pytest.mark.parametrize("blocks", [[0, 0], [2], [0, 2]])
def test_double_free_is_refused_whole(blocks: list[int]) -> None:
    allocator = BlockAllocator(4)
    allocator.allocate(2)
    with pytest.raises(StateError, match="freed twice"):
        allocator.free(blocks)
    assert allocator.num_free == 2


@pytest.mark.parametrize("block", [-1, 4])
def test_foreign_block_is_refused(block: int) -> None:
    with pytest.raises(StateError, match="do not belong"):
        BlockAllocator(4).free([block])


def test_integrity_check_sees_leaks_and_sharing() -> None:
    allocator = BlockAllocator(4)
    first, second = allocator.allocate(1), allocator.allocate(1)
    allocator.check_integrity([first, second])
    with pytest.raises(StateError, match="block tables hold"):
        allocator.check_integrity([first])
    with pytest.raises(StateError, match="block tables hold"):
        allocator.check_integrity([first, second, second])
    allocator._free.append(first[0])
    with pytest.raises(StateError, match="in use"):
        allocator.check_integrity()
    allocator._free[-1:] = []
    allocator._free.pop()
    with pytest.raises(StateError, match="are not 4"):
        allocator.check_integrity()


def test_no_block_is_refused() -> None:
    with pytest.raises(CapacityError, match="num_blocks=0"):
        BlockAllocator(0)


@pytest.mark.parametrize(
    ("cache", "expected", "reason"),
    [
        (CacheConfig(num_blocks=7), 7, "was given"),
        (CacheConfig(memory_limit=5 * 512 + 100), 5, "bytes given"),
        (CacheConfig(memory_limit=0.25), 100 * 1024 // 2 // 4 // 512, "25%"),
        (CacheConfig(), 3 * 3, "enough for max_num_seqs=3"),
    ],
    ids=["blocks", "bytes", "fraction", "auto"],
)
def test_size_follows_what_was_asked(cache: CacheConfig, expected: int, reason: str) -> None:
    size = size_cache(SPEC, cache, 3, 10, 100 * 1024, 2)
    assert size.num_blocks == expected
    assert reason in size.reason


def test_auto_stays_within_half_of_the_share() -> None:
    size = size_cache(SPEC, CacheConfig(), 1000, 1000, 100 * 1024, 2)
    assert size.num_blocks == 100 * 1024 // 2 // 2 // 512
    assert "half of" in size.reason


@pytest.mark.parametrize(
    ("cache", "free_bytes", "text"),
    [
        (CacheConfig(memory_limit=511), 10**6, "hold no block"),
        (CacheConfig(), 600, "hold no block"),
        (CacheConfig(num_blocks=1000), 10**5, "at most 195 blocks fit"),
    ],
    ids=["limit", "memory", "too many"],
)
def test_impossible_sizes_are_refused(cache: CacheConfig, free_bytes: int, text: str) -> None:
    with pytest.raises(CapacityError, match=text):
        size_cache(SPEC, cache, 4, 10, free_bytes, 1)


def test_free_memory_respects_the_control_group(tmp_path: Path) -> None:
    assert free_memory(torch.device("cpu")) > 0
    assert control_group_headroom(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\n")
    assert control_group_headroom(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert control_group_headroom(tmp_path) is None


@given(st.integers(0, 1000), st.integers(1, 64))
def test_blocks_for_is_the_smallest_that_holds(num_tokens: int, block_size: int) -> None:
    num_blocks = blocks_for(num_tokens, block_size)
    assert (num_blocks - 1) * block_size < num_tokens <= num_blocks * block_size
