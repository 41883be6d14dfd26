"""A stand-in for torch's symmetric memory between threads: it checks what the real one demands, and computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

OPERATOR = "one_shot_all_reduce_copy_out"
DTYPES = (torch.bfloat16, torch.float32)


class SymmetricMemoryStandIn:
    """The memory of `size` ranks, each a thread that ran `at(rank)`. `calls` lists what was summed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[tuple[torch.dtype, int]] = []
        self.spoil: Callable[[torch.Tensor], None] = lambda total: None
        self.cannot_map: set[int] = set()
        self._allocated: dict[int, torch.Tensor] = {}  # by rank
        self._mapped: dict[tuple[str, int], torch.Tensor] = {}  # by group and rank
        self._local = threading.local()
        self._barrier = threading.Barrier(size, timeout=60.0)
        self._library: torch.library.Library | None = None

    def at(self, rank: int) -> None:
        self._local.rank = rank

    def empty(self, *size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        memory = torch.full(size, 255, dtype=dtype, device=device)  # what is not written shows
        self._allocated[self._local.rank] = memory
        return memory

    def rendezvous(self, tensor: torch.Tensor, group: str) -> object:
        assert isinstance(group, str)
        rank = self._local.rank
        self._barrier.wait()
        assert tensor.data_ptr() == self._allocated[rank].data_ptr(), "only what empty() gave can be mapped"
        assert len({memory.nbytes for memory in self._allocated.values()}) == 1, "all ranks bring the same size"
        self._mapped[group, rank] = tensor
        self._barrier.wait()
        if rank in self.cannot_map:
            raise RuntimeError("CUDA driver error: invalid argument")
        return object()

    def sum_copied(
        self, symm_buffer: torch.Tensor, local_input: torch.Tensor, reduce_op: str, group_name: str, out: torch.Tensor
    ) -> torch.Tensor:
        rank = self._local.rank
        assert reduce_op == "sum"
        windows = [self._mapped[group_name, other] for other in range(self.size)]
        assert symm_buffer.untyped_storage().data_ptr() == windows[rank].untyped_storage().data_ptr()
        assert symm_buffer.dtype in DTYPES
        assert symm_buffer.dtype == local_input.dtype == out.dtype
        assert symm_buffer.shape == out.shape
        assert local_input.numel() == symm_buffer.numel()
        for each in (symm_buffer, local_input, out):
            assert each.is_contiguous()
            assert each.storage_offset() * each.element_size() % 16 == 0
            assert each.nbytes % 16 == 0
        symm_buffer.copy_(local_input)
        self._barrier.wait()
        offset = symm_buffer.storage_offset() * symm_buffer.element_size()
        parts = [window.view(-1)[offset : offset + symm_buffer.nbytes].view(symm_buffer.dtype) for window in windows]
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        self._barrier.wait()
        self.spoil(total)
        out.copy_(total.view_as(out))
        if rank == 0:
            self.calls.append((out.dtype, out.numel()))
        return out

    @contextmanager
    def installed(self, monkeypatch: Any) -> Iterator[None]:
        """In the place of torch's own: the operator of this name, through torch's dispatcher and schema."""
        import torch.distributed._symmetric_memory as symmetric_memory

        monkeypatch.setattr(symmetric_memory, "empty", self.empty, raising=False)
        monkeypatch.setattr(symmetric_memory, "rendezvous", self.rendezvous, raising=False)
        library = torch.library.Library("symm_mem", "IMPL", "CPU")
        library.impl(OPERATOR, self.sum_copied)
        try:
            yield
        finally:
            library._destroy()
