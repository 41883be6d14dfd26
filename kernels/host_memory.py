"""Memory of the host that is zero and is touched only when it is written."""

from __future__ import annotations

import mmap

import torch

HUGE_PAGE = 2 << 20


def zeroed_bytes(num_bytes: int, *, huge_pages: bool = False) -> torch.Tensor:
    """A `uint8` tensor of zeros, straight from the system: pages that are never written cost nothing.

    `torch.zeros` writes every byte of it instead. With `huge_pages` it begins at such a page, and the system is asked
    for them, which it may decline. Raises `MemoryError`.
    """
    spare = HUGE_PAGE if huge_pages else 0
    try:
        pages = mmap.mmap(-1, max(1, num_bytes) + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as exc:
        raise MemoryError(f"{num_bytes} bytes cannot be allocated: {exc}") from exc
    if huge_pages:
        _advise_huge(pages)
    with torch.inference_mode(mode=False):  # parts of it may be written outside of it later
        memory = torch.frombuffer(pages, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE if huge_pages else 0
    return memory[start : start + num_bytes]


def _advise_huge(pages: mmap.mmap) -> None:
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages: the memory is the same
        return
