"""BlockAllocator: which blocks of the paged cache are free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from inference_shardformer.errors import CapacityError, StateError


class BlockAllocator:
    """Hands out block ids. Deterministic: the lowest ids first, then the blocks freed last, which are warm.

    free stack   [7, 6, 5, 4, 2]     allocate(2) -> [2, 4]     free([2, 4]) -> the same stack again
    in use       [1, 1, 0, 1, 0, 0, 0, 0]
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise CapacityError(
                f"num_blocks={num_blocks}: an allocator needs at least one block",
                remedy="free memory, raise cache.memory_limit, or lower cache.block_size",
            )
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._in_use = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` blocks; nothing is taken if there are not that many."""
        if not 0 <= num_blocks <= len(self._free):
            raise CapacityError(
                f"{num_blocks} blocks were asked for, {len(self._free)} of {self.num_blocks} are free",
                remedy="ask for no more than num_free blocks, or free some first",
            )
        taken = [self._free.pop() for _ in range(num_blocks)]
        for block in taken:
            self._in_use[block] = 1
        return taken

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back; nothing is given back if one of them is not held."""
        returned = list(blocks)
        self._refuse_unless_held(returned)
        for block in reversed(returned):
            self._in_use[block] = 0
            self._free.append(block)

    def check_integrity(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Raise `StateError` unless every block is either free or in use, exactly once.

        With `tables`, the blocks in use must be exactly those of the tables, each in one table.
        """
        if len(set(self._free)) != len(self._free) or any(self._in_use[block] for block in self._free):
            raise _corrupt(f"the free stack {self._free} repeats a block or holds one in use")
        if sum(self._in_use) + len(self._free) != self.num_blocks:
            raise _corrupt(f"{sum(self._in_use)} blocks in use and {len(self._free)} free are not {self.num_blocks}")
        if tables is None:
            return
        owned = sorted(chain.from_iterable(tables))
        in_use = [block for block in range(self.num_blocks) if self._in_use[block]]
        if owned != in_use:
            raise _corrupt(f"the block tables hold {owned}, the allocator gave out {in_use}")

    def _refuse_unless_held(self, blocks: list[int]) -> None:
        foreign = [block for block in blocks if not 0 <= block < self.num_blocks]
        if foreign:
            raise StateError(
                f"blocks {foreign} do not belong to this allocator of {self.num_blocks} blocks",
                remedy="free only what allocate() returned",
            )
        free = [block for block in blocks if not self._in_use[block]]
        if free or len(set(blocks)) != len(blocks):
            raise StateError(f"blocks {blocks} are freed twice", remedy="free what allocate() returned exactly once")


def _corrupt(message: str) -> StateError:
    return StateError(f"the block allocator is corrupt: {message}", remedy="report this as a bug with the stack trace")
