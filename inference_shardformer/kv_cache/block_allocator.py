"""BlockAllocator: which blocks of the paged cache are free, and how many hold each of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from inference_shardformer.errors import CapacityError, StateError


class BlockAllocator:
    """Hands out block ids and counts their holders. Deterministic: the same calls give the same ids.

    The lowest ids come first, then the blocks freed last, which are warm. A block that is `keep()`-ed has contents that
    somebody may find: without holders it is idle, and reclaimed when nothing else is free, the longest idle first.

    holders      [2, 1, 0, 1, 0, 0, 0, 0]     block 0 is shared
    kept         [1, 0, 1, 0, 0, 0, 0, 0]
    idle         [2]                          num_free is 5: idle blocks are free, too
    free stack   [7, 6, 5, 4]                 allocate(2) -> [4, 5]     free([4, 5]) -> the same stack again
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise CapacityError(
                f"num_blocks={num_blocks}: an allocator needs at least one block",
                remedy="free memory, raise cache.memory_limit, or lower cache.block_size",
            )
        self.num_blocks = num_blocks
        self.on_reclaim: Callable[[int], None] = lambda block: None
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._kept = bytearray(num_blocks)
        self._idle: dict[int, None] = {}  # in the order in which they are reclaimed

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, idle ones included."""
        return len(self._free) + len(self._idle)

    def is_held(self, block: int) -> bool:
        """Whether somebody holds this block."""
        return self._holders[block] > 0

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` blocks; nothing is taken if there are not that many.

        `on_reclaim` is told of every idle one among them: its contents are lost.
        """
        if not 0 <= num_blocks <= self.num_free:
            raise CapacityError(
                f"{num_blocks} blocks were asked for, {self.num_free} of {self.num_blocks} are free",
                remedy="ask for no more than num_free blocks, or free some first",
            )
        taken = [self._free.pop() if self._free else self._reclaim() for _ in range(num_blocks)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Become one more holder of blocks that are held, or idle."""
        lost = [block for block in blocks if not (self._holders[block] or block in self._idle)]
        if lost:
            raise StateError(
                f"blocks {lost} are neither held nor idle", remedy="share only what is held, or kept and not reclaimed"
            )
        for block in blocks:
            self._idle.pop(block, None)
            self._holders[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Give up blocks; nothing is given up if one of them is not held.

        The last of them is idle first, so that of one sequence the end is reclaimed before the beginning.
        """
        returned = list(blocks)
        self._refuse_unless_held(returned)
        for block in reversed(returned):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._kept[block]:
                self._idle[block] = None
            else:
                self._free.append(block)

    def keep(self, block: int) -> None:
        """Note that the contents of a block that is held can be found."""
        self._refuse_unless_held([block])
        self._kept[block] = 1

    def drop(self, block: int) -> None:
        """Note that the contents of a kept block are of no use any more."""
        self._kept[block] = 0
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    @property
    def idle_blocks(self) -> list[int]:
        """The kept blocks that nobody holds, in the order in which they are reclaimed."""
        return list(self._idle)

    def check_integrity(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Raise `StateError` unless every block is in use, idle or free, exactly one of these.

        With `tables`, every block must have as many holders as tables it is in.
        """
        if len(set(self._free)) != len(self._free) or any(self._holders[block] for block in self._free):
            raise _corrupt(f"the free stack {self._free} repeats a block or holds one in use")
        if any(self._holders[block] or not self._kept[block] for block in self._idle):
            raise _corrupt(f"the idle blocks {list(self._idle)} hold one in use, or one that is not kept")
        if any(self._kept[block] for block in self._free):
            raise _corrupt(f"the free stack {self._free} holds a block that is kept")
        num_in_use = sum(map(bool, self._holders))
        if num_in_use + self.num_free != self.num_blocks:
            raise _corrupt(f"{num_in_use} blocks in use and {self.num_free} free are not {self.num_blocks}")
        if tables is None:
            return
        owned = Counter(chain.from_iterable(tables))
        in_use = {block: number for block, number in enumerate(self._holders) if number}
        if owned != in_use:
            raise _corrupt(f"the block tables hold {dict(sorted(owned.items()))}, the allocator gave out {in_use}")

    def _reclaim(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        self._kept[block] = 0
        self.on_reclaim(block)
        return block

    def _refuse_unless_held(self, blocks: list[int]) -> None:
        foreign = [block for block in blocks if not 0 <= block < self.num_blocks]
        if foreign:
            raise StateError(
                f"blocks {foreign} do not belong to this allocator of {self.num_blocks} blocks",
                remedy="free only what allocate() returned",
            )
        free = [block for block in blocks if not self._holders[block]]
        if free or len(set(blocks)) != len(blocks):
            raise StateError(f"blocks {blocks} are freed twice", remedy="free what allocate() returned exactly once")


def _corrupt(message: str) -> StateError:
    return StateError(f"the block allocator is corrupt: {message}", remedy="report this as a bug with the stack trace")
