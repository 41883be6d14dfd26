"""Zeroed memory of the host: zero, aligned, writable in any mode, and free until it is written."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from inference_shardformer.kernels.host_memory import HUGE_PAGE, zeroed_bytes

MANY = 512 << 20


@pytest.mark.parametrize("huge_pages", [False, True])
def test_zero_and_writable(huge_pages: bool) -> None:
    with torch.inference_mode():
        memory = zeroed_bytes(3 * HUGE_PAGE + 5, huge_pages=huge_pages)
    assert memory.shape == (3 * HUGE_PAGE + 5,)
    assert not memory.any()
    memory.view(torch.uint8)[-1] = 7  # outside of inference mode
    assert memory.sum() == 7
    assert memory.data_ptr() % (HUGE_PAGE if huge_pages else 4096) == 0


def test_what_is_not_written_takes_no_memory() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    memory = zeroed_bytes(MANY)
    memory[: 1 << 20] = 1
    assert process.memory_info().rss - before < MANY // 8


def test_memory_is_given_back() -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0])

    memory = zeroed_bytes(MANY)
    part = memory[5:10]
    with_it = mapped()
    del memory
    assert mapped() == with_it  # a part of it is still used
    del part
    assert mapped() <= with_it - MANY // 4096


def test_too_much_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="cannot be allocated"):
        zeroed_bytes(1 << 62)
